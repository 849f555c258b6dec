"""Weights files that were made to harm: one line, no code, and no more memory than the file has bytes."""

import os
import random
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peak_memory import peak_memory
from safetensors.torch import save_file

from sfm.backbones.build import load_backbone
from sfm.backbones.weight_files import read_weight_file
from sfm.errors import InputError

MODEL = "test_efficientnet"
MIB = 2**20


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


def make_recursive_state() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["state_dict"] = found
    return found


def make_nested_state(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"weight": torch.zeros(2)}
    for _ in range(depth):
        found = {"state_dict": found}
    return found


def save_value(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def write_content(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def write_compressed_record(record: str, size: int) -> Callable[[Path], None]:
    """A file of torch.save with a record that is packed, and so large once it is unpacked."""

    def write(path: Path) -> None:
        torch.save({"weight": torch.zeros(2)}, path.with_suffix(".sound"))
        with (
            zipfile.ZipFile(path.with_suffix(".sound")) as sound,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out,
        ):
            for name in sound.namelist():
                content = sound.read(name)
                out.writestr(name, content + bytes(size if name.endswith(record) else 0))

    return write


def write_legacy_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))


BYTEARRAY_PICKLE = b"\x80\x02}q\x00X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\xff\xff\xff\x3f\x85Rs."

HOSTILE_FILES: dict[str, Callable[[Path], None]] = {
    "packed pickle": write_compressed_record("data.pkl", 256 * MIB),
    "packed tensor": write_compressed_record("data/0", 256 * MIB),
    "a shape without values": save_value({"weight": torch.zeros(1).expand(10**6, 10**6)}),
    "sparse": save_value({"weight": torch.eye(3).to_sparse()}),
    "on no device": save_value({"weight": torch.zeros(3, device="meta")}),
    "complex": save_value({"weight": torch.zeros(3, dtype=torch.complex64)}),
    "in itself": save_value(make_recursive_state()),
    "300 deep": save_value(make_nested_state(300)),
    "a number": save_value(3),
    "numbers for names": save_value({1: {"a": torch.zeros(2)}}),
    "a pickle that asks for zeros": write_content(BYTEARRAY_PICKLE),
    "a pickle 100,000 deep": write_content(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "a pickle of commands": save_value({"weight": Command("touch pwned")}),
    "an archive of before": write_legacy_tar,
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "nothing": write_content(b""),
}


@pytest.mark.parametrize("what", HOSTILE_FILES)
def test_a_hostile_pickle_raises_a_one_line_error(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    HOSTILE_FILES[what](path)
    with (
        peak_memory() as growth,
        warnings.catch_warnings(action="error"),
        pytest.raises(InputError) as raised,
    ):
        read_weight_file(path)
    assert growth[0] < 64 * MIB
    assert re.fullmatch(r".*weights\.pth.*", str(raised.value))
    assert len(str(raised.value)) < 1000
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 20) + b"[" * 20,
        struct.pack("<Q", 78)
        + b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'[:78],
    ],
)
def test_hostile_safetensors_raise_a_one_line_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with peak_memory() as growth, pytest.raises(InputError, match=r"cannot read weights from .*weights"):
        read_weight_file(path)
    assert growth[0] < 64 * MIB


def test_a_file_of_unknown_format_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "w.pth").open("wb") as sparse:
        sparse.truncate(2**42)
    with pytest.raises(InputError, match="not a checkpoint of plain tensors"):
        read_weight_file(tmp_path / "w.pth")


def test_tensor_names_in_errors_are_escaped_and_truncated(tmp_path: Path) -> None:
    state = timm.create_model(MODEL).state_dict()
    torch.save({**state, "a\x1b[2J" * 10_000: torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"unknown a\\x1b\[2J") as raised:
        load_backbone(f"timm/{MODEL}@{tmp_path / 'weights.pth'}", image_size=32, device="cpu")
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_huge_position_embedding_is_refused_without_allocating_memory(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    torch.save({**state, "pos_embed": torch.zeros(1, 2**20 + 1, 1)}, tmp_path / "weights.pth")
    spec = f"timm/test_vit@{tmp_path / 'weights.pth'}"
    with peak_memory() as growth, pytest.raises(InputError, match="pos_embed is"):
        load_backbone(spec, image_size=32, device="cpu")
    assert growth[0] < 128 * MIB


@pytest.mark.parametrize("suffix", ["zip.pth", "old.pth", "safetensors"])
def test_random_damage_to_weights_raises_a_one_line_error(suffix: str, tmp_path: Path) -> None:
    state = dict(list(timm.create_model(MODEL).state_dict().items())[:3])
    sound = tmp_path / f"sound.{suffix}"
    if suffix == "safetensors":
        save_file(state, sound)
    else:
        new = suffix == "zip.pth"
        torch.save({"state_dict": state, "epoch": 3}, sound, _use_new_zipfile_serialization=new)
    content, path, random_numbers = sound.read_bytes(), tmp_path / f"weights.{suffix}", random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(random_numbers.choice([1, 1, 3])):
            place = random_numbers.randrange(min(len(damaged), random_numbers.choice([200, 2000, 10**9])))
            change = random_numbers.randrange(4)
            if change < 2:
                damaged[place] = random_numbers.randrange(256)
            elif change == 2:
                del damaged[place : place + random_numbers.choice([1, 8, 100])]
            else:
                damaged[place:place] = random_numbers.choice(
                    [b"]", b"}", b"R", b"\x85", b"J\xff\xff\xff\x7f", b"9"]
                )
        path.write_bytes(damaged)
        if told := read_error_message(path):
            assert re.fullmatch(r".{,1000}", told)


def read_error_message(path: Path) -> str:
    """Return what is said about a file, or nothing if it can be read."""
    try:
        read_weight_file(path)
    except InputError as error:
        return str(error)
    return ""
