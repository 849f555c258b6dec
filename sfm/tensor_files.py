"""Open safetensors files that anybody may have written: what they hold is known before it is read."""

import errno
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from sfm.text import one_line

HEADER_BYTES = 16 * 2**20
"""Longest header that is read: names, shapes and types of the tensors, and texts such as class ids."""

Declared = dict[str, tuple[str, tuple[int, ...]]]
"""Type, as safetensors names it, and shape of every tensor of a file, by name."""


class TensorFileError(ValueError):
    """It is no safetensors file, or not the one expected."""


@contextmanager
def open_tensors(path: Path, framework: Literal["pt", "numpy"], most: int) -> Iterator[Any]:
    """Open a safetensors file of at most `most` bytes of tensors; none is read yet.

    Parameters
    ----------
    path : Path
    framework : {"pt", "numpy"}
        What tensors become.
    most : int
        More bytes are refused.

    Raises
    ------
    FileNotFoundError
        If there is none.
    TensorFileError
        If it is no such file, cannot be read, or is longer.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER_BYTES or state.st_size > 8 + header + most:
            raise TensorFileError(f"{path} is longer than what it should hold")
        with safe_open(path, framework=framework) as opened:
            yield opened
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TensorFileError(f"cannot read {path}: {one_line(str(reason), 300)}") from error


def declared(file: Any) -> Declared:
    """Return what a file that is open declares to hold."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}


def require_declared(file: Any, expected: Declared, path: Path) -> None:
    """Refuse a file that is open and holds other tensors.

    Raises
    ------
    TensorFileError
        Names the first that differs.
    """
    found = declared(file)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise TensorFileError(
                f"{path} holds {described(found.get(name))} as {json.dumps(name)[:100]}, not "
                f"{described(expected.get(name))}"
            )


def described(one: tuple[str, tuple[int, ...]] | None) -> str:
    """Say what a tensor is in few words."""
    return "nothing" if one is None else f"{one[0]} of shape {list(one[1])}"
