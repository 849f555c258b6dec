"""Read untrusted files and JSON: their size is checked before memory is taken."""

import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

MAX_JSON_BYTES = 16 * 2**20
"""Longest JSON document that is read, unless another limit is given: a commit of 100,000 objects."""

MAX_EVALUATION_BYTES = 128 * 2**20
"""Longest ``evaluation.json`` that is read: hundreds of rows with figures of 10,000 classes each."""

MAX_HISTORY_BYTES = 32 * 2**20
"""Longest ``history.csv`` that is read: of half a million steps."""


class OversizeError(ValueError):
    """A file or document is longer than any that this program writes."""


def parse_json(data: bytes, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON document of at most `max_bytes` bytes, nested at most 200 deep.

    Depth and length are checked before anything is built. Numbers have at most 4,300 digits; text must be
    valid Unicode.

    Raises
    ------
    ValueError
        If it is not such a document; the message names the position.

    Examples
    --------
    >>> parse_json(b'{"classes": 10}')
    {'classes': 10}
    >>> parse_json(b"[" * 1000)
    Traceback (most recent call last):
    ValueError: recursion limit exceeded at line 1 column 202
    """
    if len(data) > max_bytes:
        raise OversizeError(f"{len(data)} bytes of JSON, at most {max_bytes} are read")
    return from_json(data)


def open_regular_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; refuse a pipe, device or socket, which may never end.

    Raises
    ------
    OSError
        If it cannot be opened, or is not a regular file.
    """
    # Opening a pipe without a writer would block without O_NONBLOCK.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_bounded_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file of at most `max_bytes` bytes.

    Raises
    ------
    OversizeError
        If it is longer; nothing has been read then.
    OSError
        If it cannot be read, or is not a regular file.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OversizeError(f"{path} has {size} bytes, at most {max_bytes} are read")
        # Python allocates the requested number of bytes, not the size of the file.
        data = file.read(size + 1)
        data += file.read(max_bytes + 1 - len(data)) if len(data) > size else b""
    if len(data) > max_bytes:
        raise OversizeError(f"{path} is longer than {max_bytes} bytes")
    return data
