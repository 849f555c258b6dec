"""Safetensors files that anybody wrote: opened only if what they declare is what they should hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sfm.tensor_files import (
    MAX_SAFETENSORS_HEADER_BYTES,
    TensorFileError,
    open_safetensors,
    read_tensor_specs,
    require_tensor_specs,
)

TENSORS = {"weight": np.zeros((2, 3), np.float32), "age": np.array(4)}
EXPECTED = {"weight": ("F32", (2, 3)), "age": ("I64", ())}
MOST = 2 * 3 * 4 + 8


@pytest.fixture
def tensor_file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_tensor_specs_are_checked_before_tensors_are_read(tensor_file: Path) -> None:
    with open_safetensors(tensor_file, "numpy", MOST) as opened:
        assert read_tensor_specs(opened) == EXPECTED
        require_tensor_specs(opened, EXPECTED, tensor_file)
        assert opened.get_tensor("age") == 4


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (
            EXPECTED | {"weight": ("F32", (2, 4))},
            r'holds F32 of shape \[2, 3\] as "weight", not F32 of shape',
        ),
        (EXPECTED | {"weight": ("F64", (2, 3))}, "not F64 of shape"),
        (EXPECTED | {"bias": ("F32", (2,))}, 'holds nothing as "bias", not F32'),
        ({"age": ("I64", ())}, r'\[2, 3\] as "weight", not nothing'),
    ],
)
def test_unexpected_tensors_are_refused_by_name(
    tensor_file: Path, expected: dict[str, object], message: str
) -> None:
    with (
        open_safetensors(tensor_file, "numpy", MOST) as opened,
        pytest.raises(TensorFileError, match=message),
    ):
        require_tensor_specs(opened, expected, tensor_file)  # type: ignore[arg-type]


def lengthen_file(tensor_file: Path) -> None:
    os.truncate(tensor_file, 2**40)


def write_large_header(tensor_file: Path) -> None:
    data = b"{" + b" " * MAX_SAFETENSORS_HEADER_BYTES + b"}"
    tensor_file.write_bytes(len(data).to_bytes(8, "little") + data)


def write_deep_header(tensor_file: Path) -> None:
    data = b'{"__metadata__":' + b"[" * 100_000
    tensor_file.write_bytes(len(data).to_bytes(8, "little") + data)


def declare_huge_tensor(tensor_file: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    data = json.dumps(header).encode()
    tensor_file.write_bytes(len(data).to_bytes(8, "little") + data)


def replace_by_pipe(tensor_file: Path) -> None:
    tensor_file.unlink()
    os.mkfifo(tensor_file)


def replace_by_folder(tensor_file: Path) -> None:
    tensor_file.unlink()
    tensor_file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lengthen_file,
        write_large_header,
        write_deep_header,
        declare_huge_tensor,
        replace_by_pipe,
        replace_by_folder,
        lambda tensor_file: tensor_file.write_bytes(b"\x01"),
    ],
)
def test_damaged_or_oversized_safetensors_file_gives_a_one_line_error(
    tensor_file: Path, damage: Callable[[Path], None]
) -> None:
    damage(tensor_file)
    with pytest.raises(TensorFileError) as caught, open_safetensors(tensor_file, "numpy", MOST):
        pass
    assert "\n" not in str(caught.value)


def test_missing_safetensors_file_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_safetensors(tmp_path / "none", "numpy", MOST):
        pass
