"""Digests: equal content has equal digests, however it was computed, chunked, compressed or stored."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 4096


def canonical(value: Any) -> bytes:
    """Return JSON in one spelling: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def block_digest(rows: npt.NDArray[Any]) -> bytes:
    """Return the SHA-256 of at most ``BLOCK_ROWS`` rows, little-endian, in C order."""
    little = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).digest()


def combine_blocks(blocks: Iterable[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """Return an array's digest from the digests of its consecutive blocks of ``BLOCK_ROWS`` rows.

    Parallel writers compute the blocks; dtype and shape are hashed with them (design, section 4).
    """
    whole = hashlib.sha256()
    for block in blocks:
        whole.update(block)
    whole.update(canonical([dtype.newbyteorder("<").str, list(shape)]))
    return whole.hexdigest()


def array_digest(array: npt.NDArray[Any]) -> str:
    """Return the digest of an array in memory."""
    return stream_digest([array], array.dtype, array.shape)


def stream_digest(parts: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """Return the digest of an array that comes as consecutive parts of any number of rows.

    Raises
    ------
    ValueError
        If the parts do not make up `shape`.
    """
    digests: list[bytes] = []
    block, rows = hashlib.sha256(), 0
    for part in parts:
        little = np.ascontiguousarray(part, dtype=dtype.newbyteorder("<"))
        while len(little):
            fitting, little = np.split(little, [BLOCK_ROWS - rows % BLOCK_ROWS])
            block.update(fitting.data)
            rows += len(fitting)
            if rows % BLOCK_ROWS == 0:
                digests.append(block.digest())
                block = hashlib.sha256()
    if rows % BLOCK_ROWS:
        digests.append(block.digest())
    if rows != shape[0]:
        raise ValueError(f"{rows} rows given, {shape[0]} announced")
    return combine_blocks(digests, dtype, shape)


def entry_digest(arrays: dict[str, str], backbone: str, fingerprint: str, options: str) -> str:
    """Return the digest of an entry's content: arrays, backbone, dataset and options, never timing."""
    content = {"arrays": arrays, "backbone": backbone, "dataset": fingerprint, "options": options}
    return sha256(canonical(content))
