"""Layouts of stored arrays: parse their metadata and compare it with the cards, before data is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError
from sfm.stats_store.cards import Commit, DatasetCard, ExtractionCard
from sfm.stats_store.commits import EntryCards
from sfm.stats_store.schema import (
    DIMENSIONS,
    is_array_in_schema,
    parse_sub_class_count,
    strip_sub_class_suffix,
)
from sfm.untrusted_files import parse_json

HIGH_COMPRESSION_RATIO = 1000
"""A compression ratio that only constant arrays exceed; features compress 1 to 5 times."""

MAX_HIGH_RATIO_BYTES = 256 * 2**20
"""Limit on the decompressed size of all chunks beyond that ratio: a few bytes could fill memory."""

MAX_ARRAY_METADATA_BYTES = 2**20
"""Limit on the ``zarr.json`` of an array; this program writes less than 2 KiB."""

MAX_AXES = max(map(len, DIMENSIONS.values()))

ALLOWED_DTYPES: dict[str, tuple[str, ...]] = {
    "train/count": ("int64",),
    "train/mean": ("float64",),
    "train/scatter_diagonal": ("float64",),
    "train/within_scatter": ("float64",),
    "train/centre": ("float32",),
    "train/centre_count": ("int64",),
    "classifier/weight": ("float32",),
    "classifier/bias": ("float32",),
    "test/feature": ("float16", "float32", "float64"),
    "test/label": ("int32",),
    "train/feature": ("float16", "float32", "float64"),
    "train/label": ("int32",),
    "exemplar/image": ("uint8",),
    "exemplar/role": ("uint8",),
    "exemplar/sample": ("int64",),
}
"""Allowed data types by array, named as :func:`~sfm.stats_store.schema.strip_sub_class_suffix` returns."""

ALLOWED_FILL_VALUES = ("NaN", 0, -1, 255)

ALLOWED_CODECS = (["bytes"], ["bytes", "blosc"], ["bytes", "crc32c"], ["bytes", "blosc", "crc32c"])
"""Codecs that arrays were ever written with: for others the size of a decoded chunk is not known."""

BLOSC_HEADER = 16
MAX_BLOSC_OVERHEAD = 2**16
CRC32C_BYTES = 4


class _NamedConfiguration(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    configuration: dict[str, Any] = {}


class _ArrayMetadata(BaseModel):
    """The fields of an array's metadata that a reader depends on."""

    model_config = ConfigDict(extra="ignore", strict=True)

    node_type: str
    zarr_format: int
    shape: list[int]
    data_type: str
    chunk_grid: _NamedConfiguration
    chunk_key_encoding: _NamedConfiguration
    fill_value: float | str
    codecs: list[_NamedConfiguration]
    storage_transformers: list[Any] = []


_CHUNK_SHAPE = TypeAdapter(list[int], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class ArrayLayout:
    """Shape, type and chunks of a stored array.

    Attributes
    ----------
    shape, chunk_shape : tuple of int
    dtype : numpy.dtype
    uses_blosc, uses_crc32c : bool
        Whether chunks are compressed with Blosc, and whether they end in a CRC32C checksum.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    uses_blosc: bool
    uses_crc32c: bool

    @property
    def nbytes(self) -> int:
        """Size of the array in memory."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def uncompressed_chunk_bytes(self) -> int:
        """Size of a chunk in memory; chunks at the edge are padded to it."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def chunk_grid_shape(self) -> tuple[int, ...]:
        """Number of chunks along every axis."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

    def iterate_chunk_keys(self) -> Iterator[str]:
        """Yield the keys of all chunks below the array, lazily: forged metadata may declare billions."""
        for chunk_number in range(prod(self.chunk_grid_shape)):
            coordinates: list[int] = []
            for size in reversed(self.chunk_grid_shape):
                chunk_number, position = divmod(chunk_number, size)
                coordinates.insert(0, position)
            yield "/".join(map(str, ("c", *coordinates)))

    def find_encoded_chunk_size_problem(self, encoded_chunk: bytes) -> str | None:
        """Return why a stored chunk must not be decoded, or None; its header tells its size in memory."""
        stored = len(encoded_chunk) - CRC32C_BYTES * self.uses_crc32c
        if not self.uses_blosc:
            return (
                None
                if stored == self.uncompressed_chunk_bytes
                else f"{stored} bytes, a chunk has {self.uncompressed_chunk_bytes}"
            )
        if stored < BLOSC_HEADER:
            return "it is too short to be compressed"
        size, block, compressed = (
            int.from_bytes(encoded_chunk[position : position + 4], "little") for position in (4, 8, 12)
        )
        if size != self.uncompressed_chunk_bytes:
            return f"it would decompress to {size} bytes, a chunk has {self.uncompressed_chunk_bytes}"
        if compressed != stored or not 0 < block <= size:
            return "its header is not that of compressed data"
        return None


def parse_array_layout(zarr_json: bytes) -> ArrayLayout:
    """Parse the metadata of an array; refuse kinds of arrays that this program never wrote.

    Raises
    ------
    ValueError
        Names the fields that are not supported.
    """
    try:
        metadata = _ArrayMetadata.model_validate(parse_json(zarr_json, MAX_ARRAY_METADATA_BYTES))
        chunk_shape = tuple(
            _CHUNK_SHAPE.validate_python(metadata.chunk_grid.configuration.get("chunk_shape"))
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "chunk_shape"
        raise ValueError(f"{where}: {first['msg'].lower()}") from None
    shape, codecs = tuple(metadata.shape), [codec.name for codec in metadata.codecs]
    supported = {
        "node_type": metadata.node_type == "array",
        "zarr_format": metadata.zarr_format == 3,
        "shape": len(shape) <= MAX_AXES and all(0 <= size < 2**63 for size in shape),
        "data_type": any(metadata.data_type in types for types in ALLOWED_DTYPES.values()),
        "chunk_grid": metadata.chunk_grid.name == "regular" and len(chunk_shape) == len(shape),
        "chunk_key_encoding": metadata.chunk_key_encoding.name == "default"
        and metadata.chunk_key_encoding.configuration.get("separator", "/") == "/",
        "fill_value": metadata.fill_value in ALLOWED_FILL_VALUES,
        "codecs": codecs in ALLOWED_CODECS,
        "storage_transformers": not metadata.storage_transformers,
    }
    unsupported = [name for name, is_supported in supported.items() if not is_supported]
    if unsupported:
        raise ValueError(f"its {' and '.join(unsupported)} cannot be those of a published array")
    if not all(1 <= chunk <= max(size, 1) for size, chunk in zip(shape, chunk_shape, strict=True)):
        raise ValueError(f"chunks of {chunk_shape} do not divide {shape}")
    return ArrayLayout(
        shape, chunk_shape, np.dtype(metadata.data_type), "blosc" in codecs, "crc32c" in codecs
    )


def compute_expected_shape(
    array_name: str, backbone: BackboneCard, dataset: DatasetCard, exemplars_per_class: int = 0
) -> tuple[int, ...]:
    """Return the shape that an array must have according to the cards of its entry.

    Parameters
    ----------
    array_name : str
        Name of an array of the schema, e.g. ``train/mean``.
    backbone, dataset : BackboneCard, DatasetCard
    exemplars_per_class : int
        Images per class.
    """
    image_size, features = backbone.preprocessing.input_size, backbone.features
    sizes = {
        "class": len(dataset.class_ids),
        "feature": features,
        "feature_b": features,
        "sub_class": parse_sub_class_count(array_name) or 0,
        "sample": dataset.test_samples if array_name.startswith("test/") else dataset.train_samples,
        "exemplar": exemplars_per_class,
        "y": image_size,
        "x": image_size,
        "channel": 3,
    }
    return tuple(sizes[axis] for axis in DIMENSIONS[strip_sub_class_suffix(array_name)])


def parse_layouts_by_path_and_problems(
    commit: Commit, cards: EntryCards, zarr_json_by_path: Mapping[str, bytes]
) -> tuple[dict[str, ArrayLayout], list[str]]:
    """Parse the metadata of every array, and compare it with the cards and with the chunks in the commit.

    Arrays that this version does not know are skipped: nothing opens them.

    Parameters
    ----------
    commit : Commit
    cards : EntryCards
        Cards of its run.
    zarr_json_by_path : mapping of str to bytes
        Every ``zarr.json`` of the run, by full path.

    Returns
    -------
    dict of str to ArrayLayout
        Layouts of the valid arrays, by full path.
    list of str
        One line per problem, with the path of the object.
    """
    layouts: dict[str, ArrayLayout] = {}
    problems: list[str] = []
    chunk_sizes = get_chunk_sizes_by_array_and_key(commit)
    for name in filter(is_array_in_schema, sorted(commit.arrays)):
        path = f"runs/{commit.run}/{name}"
        data = zarr_json_by_path.get(f"{path}/zarr.json")
        if data is None:
            # A listed object that is missing here is damaged, which was reported when it was read.
            if f"{name}/zarr.json" not in commit.objects:
                problems.append(f"missing object {path}/zarr.json: the commit does not list it")
            continue
        try:
            layout = parse_array_layout(data)
        except ValueError as error:
            problems.append(f"damaged object {path}/zarr.json: {error}")
            continue
        exemplars = get_exemplars_per_class(cards.extraction, layout) if name.startswith("exemplar/") else 0
        shape = compute_expected_shape(name, cards.backbone, cards.dataset, exemplars)
        problem = find_shape_or_dtype_problem(path, name, layout, shape) or find_chunk_list_problem(
            path, layout, chunk_sizes.get(name, {})
        )
        if problem:
            problems.append(problem)
        else:
            layouts[path] = layout
    if exemplar_problem := find_exemplar_count_mismatch(commit.run, layouts):
        problems.append(exemplar_problem)
    if compression_problem := find_decompression_bomb_problem(commit.run, layouts, chunk_sizes):
        return {}, [*problems, compression_problem]
    return layouts, problems


def parse_layouts_by_path_or_raise(
    commit: Commit, cards: EntryCards, zarr_json_by_path: Mapping[str, bytes]
) -> dict[str, ArrayLayout]:
    """Return the layouts of all arrays, as :func:`parse_layouts_by_path_and_problems` does, if all are valid.

    Raises
    ------
    DamageError
        Names an array whose metadata contradicts the cards.
    """
    layouts, problems = parse_layouts_by_path_and_problems(commit, cards, zarr_json_by_path)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamageError(problems[0] + more)
    return layouts


def get_chunk_sizes_by_array_and_key(commit: Commit) -> dict[str, dict[str, int]]:
    """Return the stored size of every chunk in a commit, by array and by key below the array."""
    metadata: dict[str, dict[str, int]] = {name: {} for name in commit.arrays}
    for path, record in commit.objects.items():
        name, separator, chunk_key = path.partition("/c/")
        if separator and name in metadata:
            metadata[name][f"c/{chunk_key}"] = record.size
    return metadata


def find_shape_or_dtype_problem(
    array_path: str, array_name: str, layout: ArrayLayout, expected_shape: tuple[int, ...]
) -> str | None:
    """Return how an array's shape or type contradicts the cards of its entry, or None."""
    if layout.shape != expected_shape:
        return (
            f"damaged object {array_path}/zarr.json: shape {layout.shape}, "
            f"by the cards of its entry {expected_shape}"
        )
    types = ALLOWED_DTYPES[strip_sub_class_suffix(array_name)]
    if layout.dtype.name not in types:
        return f"damaged object {array_path}/zarr.json: type {layout.dtype.name}, not {' or '.join(types)}"
    return None


def find_chunk_list_problem(
    array_path: str, layout: ArrayLayout, chunk_sizes_by_key: Mapping[str, int]
) -> str | None:
    """Return how the chunks of an array contradict the chunk sizes in the commit, or None."""
    missing_key = next((key for key in layout.iterate_chunk_keys() if key not in chunk_sizes_by_key), None)
    if missing_key:
        return f"missing object {array_path}/{missing_key}: the commit does not list it"
    if len(chunk_sizes_by_key) > prod(layout.chunk_grid_shape):
        return (
            f"damaged array {array_path}: the commit lists {len(chunk_sizes_by_key)} chunks, "
            f"it has {prod(layout.chunk_grid_shape)}"
        )
    max_chunk_bytes = layout.uncompressed_chunk_bytes + MAX_BLOSC_OVERHEAD
    oversized_key = next((key for key, size in chunk_sizes_by_key.items() if size > max_chunk_bytes), None)
    if oversized_key:
        size = chunk_sizes_by_key[oversized_key]
        return (
            f"damaged object {array_path}/{oversized_key}: {size} bytes, "
            f"a chunk has at most {max_chunk_bytes}"
        )
    return None


def get_exemplars_per_class(extraction: ExtractionCard, exemplar_array_layout: ArrayLayout) -> int:
    """Return the exemplars per class: from the options, or from an array for entries of early versions."""
    shape = exemplar_array_layout.shape
    exemplars = extraction.options.get("exemplars") or (shape[1] if len(shape) > 1 else 0)
    return exemplars if isinstance(exemplars, int) else 0


def find_exemplar_count_mismatch(run_id: str, layouts_by_path: Mapping[str, ArrayLayout]) -> str | None:
    """Return a problem if the exemplar arrays of a run hold different numbers of exemplars."""
    exemplar_layouts = [
        layout for path, layout in layouts_by_path.items() if path.startswith(f"runs/{run_id}/exemplar/")
    ]
    have_different_shapes = len({layout.shape[:2] for layout in exemplar_layouts}) > 1
    return (
        f"damaged run runs/{run_id}: its exemplar arrays have different lengths"
        if have_different_shapes
        else None
    )


def find_decompression_bomb_problem(
    run_id: str,
    layouts_by_path: Mapping[str, ArrayLayout],
    chunk_sizes_by_array: Mapping[str, Mapping[str, int]],
) -> str | None:
    """Return a problem if little storage would take much memory: see ``MAX_HIGH_RATIO_BYTES``."""
    unpacked_bytes = sum(
        layout.uncompressed_chunk_bytes
        for path, layout in layouts_by_path.items()
        for size in chunk_sizes_by_array[path.removeprefix(f"runs/{run_id}/")].values()
        if size * HIGH_COMPRESSION_RATIO < layout.uncompressed_chunk_bytes
    )
    if unpacked_bytes <= MAX_HIGH_RATIO_BYTES:
        return None
    return (
        f"damaged run runs/{run_id}: {unpacked_bytes} bytes of its arrays are compressed more than "
        f"{HIGH_COMPRESSION_RATIO} times, as no statistics are"
    )
