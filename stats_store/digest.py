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
    blocks = (block_digest(array[i : i + BLOCK_ROWS]) for i in range(0, len(array), BLOCK_ROWS))
    return combine_blocks(blocks, array.dtype, array.shape)


def entry_digest(arrays: dict[str, str], backbone: str, fingerprint: str, options: str) -> str:
    """Return the digest of an entry's content: arrays, backbone, dataset and options, never timing."""
    content = {"arrays": arrays, "backbone": backbone, "dataset": fingerprint, "options": options}
    return sha256(canonical(content))
