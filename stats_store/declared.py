"""Shapes and types of an entry's arrays, as its cards declare them: known before anything is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sfm.backbones.card import BackboneCard
from sfm.errors import DamageError
from sfm.stats_store.cards import Commit, DatasetCard, ExtractionCard
from sfm.stats_store.commits import Cards
from sfm.stats_store.schema import DIMENSIONS, generic, is_known, sub_classes
from sfm.untrusted_files import parse_json

HIGH_RATIO = 1000
"""A compression ratio that only constants exceed; features have 1 to 5."""

HIGH_RATIO_BYTES = 256 * 2**20
"""What the chunks of an entry beyond that ratio may decompress to, all together: they take memory and hardly
any storage."""

ARRAY_METADATA_BYTES = 2**20
"""Longest ``zarr.json`` of an array; this program writes less than 2 KiB."""

MOST_AXES = max(map(len, DIMENSIONS.values()))

TYPES: dict[str, tuple[str, ...]] = {
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
"""Types that arrays were ever written with, by :func:`~sfm.stats_store.schema.generic` name."""

FILLS = ("NaN", 0, -1, 255)

CODECS = (["bytes"], ["bytes", "blosc"], ["bytes", "crc32c"], ["bytes", "blosc", "crc32c"])
"""Codecs that arrays were ever written with. Of these alone it is known what a chunk takes in memory."""

BLOSC_HEADER = 16
BLOSC_OVERHEAD = 2**16
CRC32C_BYTES = 4


class _Named(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    configuration: dict[str, Any] = {}


class _Metadata(BaseModel):
    """What a reader goes by in the metadata of an array."""

    model_config = ConfigDict(extra="ignore", strict=True)

    node_type: str
    zarr_format: int
    shape: list[int]
    data_type: str
    chunk_grid: _Named
    chunk_key_encoding: _Named
    fill_value: float | str
    codecs: list[_Named]
    storage_transformers: list[Any] = []


_CHUNK_SHAPE = TypeAdapter(list[int], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class Layout:
    """Shape, type and chunks of a stored array.

    Attributes
    ----------
    shape, chunk_shape : tuple of int
    dtype : numpy.dtype
    blosc, crc32c : bool
        Whether chunks are compressed, and end in a checksum.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blosc: bool
    crc32c: bool

    @property
    def nbytes(self) -> int:
        """Size of the array in memory."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk in memory; those at the edge have it too."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along every axis."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

    def chunks(self) -> Iterator[str]:
        """Yield the keys of all chunks below the array, one by one: there may be more than anything holds."""
        for number in range(prod(self.grid)):
            place: list[int] = []
            for size in reversed(self.grid):
                number, at = divmod(number, size)
                place.insert(0, at)
            yield "/".join(map(str, ("c", *place)))

    def chunk_problem(self, data: bytes) -> str | None:
        """Return why a chunk must not be decoded, or None; its first bytes say what it would take."""
        stored = len(data) - CRC32C_BYTES * self.crc32c
        if not self.blosc:
            return None if stored == self.chunk_bytes else f"{stored} bytes, a chunk has {self.chunk_bytes}"
        if stored < BLOSC_HEADER:
            return "it is too short to be compressed"
        size, block, compressed = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
        if size != self.chunk_bytes:
            return f"it would decompress to {size} bytes, a chunk has {self.chunk_bytes}"
        if compressed != stored or not 0 < block <= size:
            return "its header is not that of compressed data"
        return None


def read_layout(data: bytes) -> Layout:
    """Read the metadata of an array, of a kind that this program ever wrote.

    Raises
    ------
    ValueError
        If it is of another kind; says why.
    """
    try:
        found = _Metadata.model_validate(parse_json(data, ARRAY_METADATA_BYTES))
        chunk_shape = tuple(_CHUNK_SHAPE.validate_python(found.chunk_grid.configuration.get("chunk_shape")))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "chunk_shape"
        raise ValueError(f"{where}: {first['msg'].lower()}") from None
    shape, codecs = tuple(found.shape), [codec.name for codec in found.codecs]
    supported = {
        "node_type": found.node_type == "array",
        "zarr_format": found.zarr_format == 3,
        "shape": len(shape) <= MOST_AXES and all(0 <= size < 2**63 for size in shape),
        "data_type": any(found.data_type in types for types in TYPES.values()),
        "chunk_grid": found.chunk_grid.name == "regular" and len(chunk_shape) == len(shape),
        "chunk_key_encoding": found.chunk_key_encoding.name == "default"
        and found.chunk_key_encoding.configuration.get("separator", "/") == "/",
        "fill_value": found.fill_value in FILLS,
        "codecs": codecs in CODECS,
        "storage_transformers": not found.storage_transformers,
    }
    wrong = [name for name, fine in supported.items() if not fine]
    if wrong:
        raise ValueError(f"its {' and '.join(wrong)} cannot be those of a published array")
    if not all(1 <= chunk <= max(size, 1) for size, chunk in zip(shape, chunk_shape, strict=True)):
        raise ValueError(f"chunks of {chunk_shape} do not divide {shape}")
    return Layout(shape, chunk_shape, np.dtype(found.data_type), "blosc" in codecs, "crc32c" in codecs)


def declared_shape(
    name: str, backbone: BackboneCard, dataset: DatasetCard, exemplars: int = 0
) -> tuple[int, ...]:
    """Return the shape that an array has by the cards of its entry.

    Parameters
    ----------
    name : str
        Of an array of the schema, e.g. ``train/mean``.
    backbone, dataset : BackboneCard, DatasetCard
    exemplars : int
        Images per class.
    """
    side, features = backbone.preprocessing.input_size, backbone.features
    sizes = {
        "class": len(dataset.class_ids),
        "feature": features,
        "feature_b": features,
        "sub_class": sub_classes(name) or 0,
        "sample": dataset.test_samples if name.startswith("test/") else dataset.train_samples,
        "exemplar": exemplars,
        "y": side,
        "x": side,
        "channel": 3,
    }
    return tuple(sizes[axis] for axis in DIMENSIONS[generic(name)])


def find_layouts(
    commit: Commit, cards: Cards, metadata: Mapping[str, bytes]
) -> tuple[dict[str, Layout], list[str]]:
    """Compare the metadata of every known array with the cards, and with the chunks that a commit lists.

    Arrays that this version does not know are left out: nobody opens them.

    Parameters
    ----------
    commit : Commit
    cards : Cards
        Of its run.
    metadata : mapping of str to bytes
        Every ``zarr.json`` of the run, by full path.

    Returns
    -------
    dict of str to Layout
        By full path of the array, those that can be read.
    list of str
        One line per problem, with the path of the object.
    """
    layouts: dict[str, Layout] = {}
    problems: list[str] = []
    listed = chunks_by_array(commit)
    for name in filter(is_known, sorted(commit.arrays)):
        path = f"runs/{commit.run}/{name}"
        data = metadata.get(f"{path}/zarr.json")
        if data is None:
            # What is listed and damaged was reported where it was read.
            listed_too = f"{name}/zarr.json" in commit.objects
            problems += (
                [] if listed_too else [f"missing object {path}/zarr.json: the commit does not list it"]
            )
            continue
        try:
            layout = read_layout(data)
        except ValueError as error:
            problems.append(f"damaged object {path}/zarr.json: {error}")
            continue
        exemplars = exemplars_per_class(cards.extraction, layout) if name.startswith("exemplar/") else 0
        shape = declared_shape(name, cards.backbone, cards.dataset, exemplars)
        problem = shape_problem(path, name, layout, shape) or list_problem(path, layout, listed.get(name, {}))
        if problem:
            problems.append(problem)
        else:
            layouts[path] = layout
    problems += exemplar_problems(commit.run, layouts)
    if excessive := high_ratio_problem(commit.run, layouts, listed):
        return {}, [*problems, excessive]
    return layouts, problems


def require_layouts(commit: Commit, cards: Cards, metadata: Mapping[str, bytes]) -> dict[str, Layout]:
    """Return the layouts of :func:`find_layouts`.

    Raises
    ------
    DamageError
        If the metadata of an array is not what the cards declare; names it.
    """
    layouts, problems = find_layouts(commit, cards, metadata)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamageError(problems[0] + more)
    return layouts


def chunks_by_array(commit: Commit) -> dict[str, dict[str, int]]:
    """Return the size of every chunk that a commit lists, by array and by key below the array."""
    found: dict[str, dict[str, int]] = {name: {} for name in commit.arrays}
    for path, record in commit.objects.items():
        name, between, rest = path.partition("/c/")
        if between and name in found:
            found[name][f"c/{rest}"] = record.size
    return found


def shape_problem(path: str, name: str, layout: Layout, shape: tuple[int, ...]) -> str | None:
    """Return how an array differs in shape or type from what its entry's cards declare, or None."""
    if layout.shape != shape:
        return f"damaged object {path}/zarr.json: shape {layout.shape}, by the cards of its entry {shape}"
    types = TYPES[generic(name)]
    if layout.dtype.name not in types:
        return f"damaged object {path}/zarr.json: type {layout.dtype.name}, not {' or '.join(types)}"
    return None


def list_problem(path: str, layout: Layout, listed: Mapping[str, int]) -> str | None:
    """Return how the chunks of an array differ from those that a commit lists, by key and size, or None."""
    missing = next((key for key in layout.chunks() if key not in listed), None)
    if missing:
        return f"missing object {path}/{missing}: the commit does not list it"
    if len(listed) > prod(layout.grid):
        return f"damaged array {path}: the commit lists {len(listed)} chunks, it has {prod(layout.grid)}"
    most = layout.chunk_bytes + BLOSC_OVERHEAD
    large = next((key for key, size in listed.items() if size > most), None)
    if large:
        return f"damaged object {path}/{large}: {listed[large]} bytes, a chunk has at most {most}"
    return None


def exemplars_per_class(extraction: ExtractionCard, layout: Layout) -> int:
    """Return how many exemplars a class has: what the options say, or an array of an early entry."""
    number = extraction.options.get("exemplars") or (layout.shape[1] if len(layout.shape) > 1 else 0)
    return number if isinstance(number, int) else 0


def exemplar_problems(run: str, layouts: Mapping[str, Layout]) -> list[str]:
    """Return whether arrays of exemplars hold different numbers of them."""
    own = [layout for path, layout in layouts.items() if path.startswith(f"runs/{run}/exemplar/")]
    different = len({layout.shape[:2] for layout in own}) > 1
    return [f"damaged run runs/{run}: its exemplar arrays have different lengths"] if different else []


def high_ratio_problem(
    run: str, layouts: Mapping[str, Layout], listed: Mapping[str, Mapping[str, int]]
) -> str | None:
    """Return whether few bytes of storage would take much memory: see ``HIGH_RATIO_BYTES``."""
    unpacked = sum(
        layout.chunk_bytes
        for path, layout in layouts.items()
        for size in listed[path.removeprefix(f"runs/{run}/")].values()
        if size * HIGH_RATIO < layout.chunk_bytes
    )
    if unpacked <= HIGH_RATIO_BYTES:
        return None
    return (
        f"damaged run runs/{run}: {unpacked} bytes of its arrays are compressed more than {HIGH_RATIO} "
        f"times, as no statistics are"
    )
