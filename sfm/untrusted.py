"""Reading files and JSON that anybody may have written: bounded before memory is taken."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

JSON_BYTES = 16 * 2**20
"""Longest JSON document that is read: a commit of 100,000 objects, a card of 100,000 classes."""


class OversizeError(ValueError):
    """Something is longer than anything this program writes."""


def parse_json(data: bytes, most: int = JSON_BYTES) -> Any:
    """Parse a JSON document of at most `most` bytes, nested at most 200 deep.

    Depth and length are bounded before anything is built, numbers to 4,300 digits; text must be valid
    Unicode.

    Raises
    ------
    ValueError
        If it is no such document; says where.

    Examples
    --------
    >>> parse_json(b'{"classes": 10}')
    {'classes': 10}
    >>> parse_json(b"[" * 1000)
    Traceback (most recent call last):
    ValueError: recursion limit exceeded at line 1 column 202
    """
    if len(data) > most:
        raise OversizeError(f"{len(data)} bytes of JSON, at most {most} are read")
    return from_json(data)


def read_file(path: Path, most: int = JSON_BYTES) -> bytes:
    """Read a file of at most `most` bytes; no pipe, device or socket, which may never end.

    Raises
    ------
    OversizeError
        If it is longer; nothing has been read then.
    OSError
        If it cannot be read, or is no regular file.
    """
    # A pipe that nobody writes must not be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if state.st_size > most:
            raise OversizeError(f"{path} has {state.st_size} bytes, at most {most} are read")
        # Python takes memory for as many bytes as are asked for, not as there are.
        data = file.read(state.st_size + 1)
        data += file.read(most + 1 - len(data)) if len(data) > state.st_size else b""
    if len(data) > most:
        raise OversizeError(f"{path} is longer than {most} bytes")
    return data
