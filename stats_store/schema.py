"""Schema 1.0: which arrays an entry holds, how they are named, chunked and encoded (design, section 4)."""

import re
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec

from sfm.errors import InputError
from sfm.stats_store.cards import SCHEMA_MAJOR, SchemaVersion
from sfm.stats_store.digest import BLOCK_ROWS
from sfm.text import sanitize_line

CROP_MODE = "crop_mode"
"""Required by entries of a backbone that is not fed a centre crop, which older versions cannot make."""

KNOWN_REQUIREMENTS = frozenset({CROP_MODE})

CHUNK_BYTES = 4 * 2**20

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


NUMBERED = re.compile(r"(train/centre|train/centre_count)(_[1-9][0-9]{0,5})")
"""Names of the arrays of which an entry holds one per number of sub-classes."""


def generic(name: str) -> str:
    """Return the name that arrays of one kind share: ``train/centre`` for every ``train/centre_<K>``."""
    found = NUMBERED.fullmatch(name)
    return found[1] if found else name


def sub_classes(name: str) -> int | None:
    """Return the number of sub-classes per class in the name of an array, if it has one.

    Examples
    --------
    >>> sub_classes("train/centre_count_10"), sub_classes("train/count")
    (10, None)
    """
    found = NUMBERED.fullmatch(name)
    return int(found[2][1:]) if found else None


def dimensions(name: str) -> tuple[str, ...]:
    """Return the dimension names of an array.

    ``train/centre_5`` and ``train/centre_10`` lie in one group, in which a dimension has one length: their
    axis over sub-classes is called ``sub_class_5`` and ``sub_class_10``.
    """
    number = name.removeprefix(generic(name))
    return tuple(axis + number if axis == "sub_class" else axis for axis in DIMENSIONS[generic(name)])


def chunk_shape(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return the chunk shape of an array: whole along every axis but the first.

    Arrays over samples are chunked in blocks of ``BLOCK_ROWS``, so that no two partitions share a chunk; the
    others in as many rows as fit ``CHUNK_BYTES``.
    """
    if dimensions(name)[0] == "sample":
        return (min(BLOCK_ROWS, max(shape[0], 1)), *shape[1:])
    row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
    return (min(max(shape[0], 1), max(1, CHUNK_BYTES // max(row_bytes, 1))), *shape[1:])


def fill_value(dtype: np.dtype[Any]) -> float | int:
    """Return what stands where nothing was written: NaN, -1, or 255 for bytes."""
    if dtype.kind == "f":
        return float("nan")
    return 255 if dtype == np.uint8 else -1


def create_array(
    objects: Store, run: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> "zarr.Array[Any]":
    """Create an empty array of a run: Blosc-Zstd with byte shuffle, then CRC32C on every chunk.

    The codec was chosen, of those that bare zarr-python reads, by ``benchmarks/store_size.py``.
    """
    return zarr.create_array(
        objects,
        name=f"runs/{run}/{name}",
        shape=shape,
        chunks=chunk_shape(name, shape, dtype),
        dtype=dtype,
        compressors=[BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"), Crc32cCodec()],
        fill_value=fill_value(dtype),
        dimension_names=dimensions(name),
        config={"write_empty_chunks": True},
        zarr_format=3,
    )


class UpgradeError(InputError):
    """Something was written by a later version, in a way that this one must not guess at."""


def is_known(name: str) -> bool:
    """Say whether an array is of this schema; a newer minor version may hold others."""
    axes = DIMENSIONS.get(generic(name), ())
    return bool(axes) and ("sub_class" in axes) == (sub_classes(name) is not None)


def require_readable(schema: SchemaVersion, where: str) -> None:
    """Refuse a schema that this version cannot read.

    Raises
    ------
    UpgradeError
        If the major version is another one, or something unknown is required.
    """
    if schema.major != SCHEMA_MAJOR:
        raise UpgradeError(
            f"{where} has schema {schema.major}.{schema.minor}; this version of sfm reads schema "
            f"{SCHEMA_MAJOR}.x: upgrade sfm-distill"
        )
    unknown = sorted(set(schema.requires) - KNOWN_REQUIREMENTS)
    if unknown:
        raise UpgradeError(
            f"{where} requires {sanitize_line(', '.join(unknown), 200)}, unknown to this version: "
            f"upgrade sfm-distill"
        )
