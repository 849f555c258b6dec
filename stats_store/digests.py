"""SHA-256 digests of content: independent of how it was computed, chunked, compressed or stored."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 4096


def encode_canonical_json(value: Any) -> bytes:
    """Encode a value as canonical JSON: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def compute_sha256(data: bytes | memoryview) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def compute_block_digest(rows: npt.NDArray[Any]) -> bytes:
    """Return the SHA-256 of at most ``BLOCK_ROWS`` rows, little-endian, in C order."""
    little_endian = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    return hashlib.sha256(little_endian.data).digest()


def combine_block_digests(
    block_digests: Iterable[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> str:
    """Return an array's digest from the digests of its consecutive blocks of ``BLOCK_ROWS`` rows.

    Parallel writers compute the block digests; dtype and shape are hashed with them.
    """
    array_hash = hashlib.sha256()
    for digest in block_digests:
        array_hash.update(digest)
    array_hash.update(encode_canonical_json([dtype.newbyteorder("<").str, list(shape)]))
    return array_hash.hexdigest()


def compute_array_digest(array: npt.NDArray[Any]) -> str:
    """Return the digest of an array in memory."""
    return compute_chunked_array_digest([array], array.dtype, array.shape)


def compute_chunked_array_digest(
    row_chunks: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> str:
    """Return the digest of an array that is given in consecutive chunks of any number of rows.

    Raises
    ------
    ValueError
        If the chunks do not add up to `shape`.
    """
    digests: list[bytes] = []
    block_hash, row_count = hashlib.sha256(), 0
    for rows_chunk in row_chunks:
        little_endian = np.ascontiguousarray(rows_chunk, dtype=dtype.newbyteorder("<"))
        while len(little_endian):
            fitting_rows, little_endian = np.split(little_endian, [BLOCK_ROWS - row_count % BLOCK_ROWS])
            block_hash.update(fitting_rows.data)
            row_count += len(fitting_rows)
            if row_count % BLOCK_ROWS == 0:
                digests.append(block_hash.digest())
                block_hash = hashlib.sha256()
    if row_count % BLOCK_ROWS:
        digests.append(block_hash.digest())
    if row_count != shape[0]:
        raise ValueError(f"{row_count} rows given, {shape[0]} announced")
    return combine_block_digests(digests, dtype, shape)


def compute_entry_digest(
    digests_by_array: dict[str, str], backbone_hash: str, dataset_fingerprint: str, options_digest: str
) -> str:
    """Return the digest of the content of an entry: arrays, backbone, dataset and options, not timing."""
    content = {
        "arrays": digests_by_array,
        "backbone": backbone_hash,
        "dataset": dataset_fingerprint,
        "options": options_digest,
    }
    return compute_sha256(encode_canonical_json(content))
