"""Open safetensors files that anybody may have written: what they hold is known before it is read."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from sfm.text import sanitize_line
from sfm.untrusted_files import open_regular_file

MAX_SAFETENSORS_HEADER_BYTES = 16 * 2**20
"""Longest header that is read: names, shapes and types of the tensors, and texts such as class ids."""

TensorSpecs = dict[str, tuple[str, tuple[int, ...]]]
"""Type, as safetensors names it, and shape of every tensor of a file, by name."""


class TensorFileError(ValueError):
    """It is no safetensors file, or not the one expected."""


@contextmanager
def open_safetensors(path: Path, framework: Literal["pt", "numpy"], max_bytes: int) -> Iterator[Any]:
    """Open a safetensors file of at most `max_bytes` bytes of tensors; none is read yet.

    Parameters
    ----------
    path : Path
    framework : {"pt", "numpy"}
        What tensors become.
    max_bytes : int
        More bytes are refused.

    Raises
    ------
    FileNotFoundError
        If there is none.
    TensorFileError
        If it is no such file, cannot be read, or is longer.
    """
    try:
        with open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_SAFETENSORS_HEADER_BYTES or size > 8 + header + max_bytes:
            raise TensorFileError(f"{path} is longer than what it should hold")
        with safe_open(path, framework=framework) as opened:
            yield opened
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TensorFileError(f"cannot read {path}: {sanitize_line(str(reason), 300)}") from error


def read_tensor_specs(file: Any) -> TensorSpecs:
    """Return what a file that is open declares to hold."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}


def require_tensor_specs(file: Any, expected: TensorSpecs, path: Path) -> None:
    """Refuse a file that is open and holds other tensors.

    Raises
    ------
    TensorFileError
        Names the first that differs.
    """
    found = read_tensor_specs(file)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise TensorFileError(
                f"{path} holds {describe_tensor_spec(found.get(name))} as {json.dumps(name)[:100]}, not "
                f"{describe_tensor_spec(expected.get(name))}"
            )


def describe_tensor_spec(one: tuple[str, tuple[int, ...]] | None) -> str:
    """Say what a tensor is in few words."""
    return "nothing" if one is None else f"{one[0]} of shape {list(one[1])}"
