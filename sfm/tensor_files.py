"""Open untrusted safetensors files: shapes and types are checked before tensors are read."""

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
"""Longest header that is read: names, shapes and types of tensors, and texts such as class ids."""

DtypeAndShapeByTensor = dict[str, tuple[str, tuple[int, ...]]]
"""Type (as safetensors names it) and shape of every tensor of a file, by name."""


class TensorFileError(ValueError):
    """A file is not a safetensors file, or holds other tensors than expected."""


@contextmanager
def open_safetensors(path: Path, framework: Literal["pt", "numpy"], max_tensor_bytes: int) -> Iterator[Any]:
    """Open a safetensors file whose tensors take at most `max_tensor_bytes` bytes; no tensor is read yet.

    Parameters
    ----------
    path : Path
    framework : {"pt", "numpy"}
        Library of the returned tensors.
    max_tensor_bytes : int
        Longer files are refused.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TensorFileError
        If it is not a safetensors file, cannot be read, or is longer.
    """
    try:
        with open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_SAFETENSORS_HEADER_BYTES or size > 8 + header + max_tensor_bytes:
            raise TensorFileError(f"{path} is longer than expected")
        with safe_open(path, framework=framework) as opened:
            yield opened
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TensorFileError(f"cannot read {path}: {sanitize_line(str(reason), 300)}") from error


def read_tensor_specs(safetensors_file: Any) -> DtypeAndShapeByTensor:
    """Return type and shape of every tensor that the header of an open file declares."""
    slices = {name: safetensors_file.get_slice(name) for name in safetensors_file.keys()}  # noqa: SIM118 - not a dict
    return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


def require_tensor_specs(safetensors_file: Any, expected: DtypeAndShapeByTensor, path: Path) -> None:
    """Refuse an open file whose tensors have other names, types or shapes than expected.

    Raises
    ------
    TensorFileError
        If there is a difference; names the first tensor that differs.
    """
    actual = read_tensor_specs(safetensors_file)
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise TensorFileError(
                f"{path} holds {describe_tensor_spec(actual.get(name))} as {json.dumps(name)[:100]}, not "
                f"{describe_tensor_spec(expected.get(name))}"
            )


def describe_tensor_spec(dtype_and_shape: tuple[str, tuple[int, ...]] | None) -> str:
    """Return type and shape of a tensor as text."""
    return (
        "nothing" if dtype_and_shape is None else f"{dtype_and_shape[0]} of shape {list(dtype_and_shape[1])}"
    )
