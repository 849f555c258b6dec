"""Schema 1.0: the arrays of an entry, and how they are named, chunked and encoded."""

import re
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec

from sfm.errors import InputError
from sfm.stats_store.cards import SCHEMA_MAJOR, SchemaVersion
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.text import sanitize_line

CROP_MODE_REQUIREMENT = "crop_mode"
"""Requirement of entries whose backbone takes another crop than the centre, which older versions lack."""

KNOWN_REQUIREMENTS = frozenset({CROP_MODE_REQUIREMENT})

MAX_CHUNK_BYTES = 4 * 2**20

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "train/count": ("class",),
    "train/mean": ("class", "feature"),
    "train/scatter_diagonal": ("class", "feature"),
    "train/within_scatter": ("feature", "feature_b"),
    "train/centre": ("class", "sub_class", "feature"),
    "train/centre_count": ("class", "sub_class"),
    "classifier/weight": ("class", "feature"),
    "classifier/bias": ("class",),
    "test/feature": ("sample", "feature"),
    "test/label": ("sample",),
    "train/feature": ("sample", "feature"),
    "train/label": ("sample",),
    "exemplar/image": ("class", "exemplar", "y", "x", "channel"),
    "exemplar/role": ("class", "exemplar"),
    "exemplar/sample": ("class", "exemplar"),
}


SUB_CLASS_ARRAY_NAME = re.compile(r"(train/centre|train/centre_count)(_[1-9][0-9]{0,5})")
"""Names of arrays that an entry holds once per number of sub-classes."""


def strip_sub_class_suffix(array_name: str) -> str:
    """Return the kind of an array: its name without the number of sub-classes of ``train/centre_<K>``."""
    match = SUB_CLASS_ARRAY_NAME.fullmatch(array_name)
    return match[1] if match else array_name


def parse_sub_class_count(array_name: str) -> int | None:
    """Return the number of sub-classes per class in the name of an array; None if it has none.

    Examples
    --------
    >>> parse_sub_class_count("train/centre_count_10"), parse_sub_class_count("train/count")
    (10, None)
    """
    match = SUB_CLASS_ARRAY_NAME.fullmatch(array_name)
    return int(match[2][1:]) if match else None


def make_dimension_names(array_name: str) -> tuple[str, ...]:
    """Return the dimension names of an array.

    ``train/centre_5`` and ``train/centre_10`` share a group, in which a dimension has one length: their axes
    over sub-classes are named ``sub_class_5`` and ``sub_class_10``.
    """
    suffix = array_name.removeprefix(strip_sub_class_suffix(array_name))
    return tuple(
        axis + suffix if axis == "sub_class" else axis
        for axis in DIMENSIONS[strip_sub_class_suffix(array_name)]
    )


def choose_chunk_shape(array_name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return the chunk shape of an array, which divides only the first axis.

    Arrays over samples have chunks of ``BLOCK_ROWS``, so that no two partitions share a chunk; the others
    have as many rows per chunk as fit in ``MAX_CHUNK_BYTES``.
    """
    if make_dimension_names(array_name)[0] == "sample":
        return (min(BLOCK_ROWS, max(shape[0], 1)), *shape[1:])
    row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
    return (min(max(shape[0], 1), max(1, MAX_CHUNK_BYTES // max(row_bytes, 1))), *shape[1:])


def get_fill_value(dtype: np.dtype[Any]) -> float | int:
    """Return the fill value of a data type: NaN for floats, 255 for bytes, else -1."""
    if dtype.kind == "f":
        return float("nan")
    return 255 if dtype == np.uint8 else -1


def create_run_array(
    zarr_store: Store, run_id: str, array_name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> "zarr.Array[Any]":
    """Create an empty array of a run: Blosc-Zstd with byte shuffle, then CRC32C on every chunk.

    ``benchmarks/store_size.py`` compares it with the other codecs that zarr-python reads without plug-ins.
    """
    return zarr.create_array(
        zarr_store,
        name=f"runs/{run_id}/{array_name}",
        shape=shape,
        chunks=choose_chunk_shape(array_name, shape, dtype),
        dtype=dtype,
        compressors=[BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"), Crc32cCodec()],
        fill_value=get_fill_value(dtype),
        dimension_names=make_dimension_names(array_name),
        config={"write_empty_chunks": True},
        zarr_format=3,
    )


class UpgradeNeededError(InputError):
    """Data was written by a newer version of this program, and this one cannot read it."""


def is_array_in_schema(array_name: str) -> bool:
    """Return whether an array belongs to this schema; a newer minor version may have others."""
    dimensions = DIMENSIONS.get(strip_sub_class_suffix(array_name), ())
    return bool(dimensions) and ("sub_class" in dimensions) == (parse_sub_class_count(array_name) is not None)


def require_supported_schema(schema: SchemaVersion, error_subject: str) -> None:
    """Check that this version can read a schema; `error_subject` names its document in errors.

    Raises
    ------
    UpgradeNeededError
        If the major version differs, or a requirement is unknown.
    """
    if schema.major != SCHEMA_MAJOR:
        raise UpgradeNeededError(
            f"{error_subject} has schema {schema.major}.{schema.minor}; this version of sfm reads schema "
            f"{SCHEMA_MAJOR}.x: upgrade sfm-distill"
        )
    unknown = sorted(set(schema.requires) - KNOWN_REQUIREMENTS)
    if unknown:
        raise UpgradeNeededError(
            f"{error_subject} requires {sanitize_line(', '.join(unknown), 200)}, unknown to this version: "
            f"upgrade sfm-distill"
        )
