"""Images of other programs: every container gives the same pixels, and none runs code or fills memory."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sfm.errors import InputError
from sfm.foreign_images import ForeignImages
from sfm.pipeline import foreign_image_reader
from sfm.pipeline.foreign_image_reader import read_foreign_images

SIDE = 12
MIB = 2**20


def draw_pixels(seed: int = 0, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


PIXELS, LABELS = draw_pixels(), [2, 0, 1, 0, 2]


def encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    """As LGM ships them: channels first, in 0 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def write_dict_of_tensors(path: Path) -> Path:
    torch.save({"images": to_torch(PIXELS), "labels": torch.tensor(LABELS)}, path / "data.pth")
    return path / "data.pth"


def write_pair_of_tensors(path: Path) -> Path:
    torch.save((to_torch(PIXELS).half(), torch.tensor(LABELS)), path / "pair.pt")
    return path / "pair.pt"


def write_npz(path: Path) -> Path:
    np.savez_compressed(path / "set.npz", X=PIXELS, y=np.array(LABELS)[:, None], loss=np.zeros(3))
    return path / "set.npz"


def write_folder(path: Path) -> Path:
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (path / "set" / str(label)).mkdir(parents=True, exist_ok=True)
        (path / "set" / str(label) / f"{i}.png").write_bytes(encode_png(pixels))
    return path / "set"


def write_tar(path: Path) -> Path:
    with tarfile.open(path / "set.tar", "w") as archive:
        for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            for suffix, data in (("png", encode_png(pixels)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path / "set.tar"


def write_table(path: Path) -> Path:
    rows = {"image": [{"bytes": encode_png(p), "path": None} for p in PIXELS], "label": LABELS}
    pq.write_table(pa.table(rows), path / "set.parquet")
    return path / "set.parquet"


WRITERS = [
    write_dict_of_tensors,
    write_pair_of_tensors,
    write_npz,
    write_folder,
    write_tar,
    write_table,
]


def sort_by_class_and_pixels(images: ForeignImages) -> list[tuple[int, bytes]]:
    return sorted(
        (int(label), pixels.tobytes())
        for label, pixels in zip(images.class_labels, images.pixels, strict=True)
    )


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_container_gives_the_same_pixels_and_labels(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    images = read_foreign_images(write(tmp_path), SIDE)
    expected = sorted((label, pixels.tobytes()) for label, pixels in zip(LABELS, PIXELS, strict=True))
    assert sort_by_class_and_pixels(images) == expected
    assert not any("resized" in note for note in images.notes)


def test_images_of_any_size_become_the_canvas_and_a_note_says_so(tmp_path: Path) -> None:
    wide = np.random.default_rng(1).integers(0, 256, (1, 10, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=wide, labels=[0])
    images = read_foreign_images(tmp_path / "set.npz", 15)
    square = Image.fromarray(wide[0, :, 5:15]).resize((15, 15), Image.Resampling.BICUBIC)
    assert np.array_equal(images.pixels[0], np.asarray(square))
    assert images.notes == [
        "The images are of 20 x 10 pixels: the central square of each was resized to 15 x 15 (bicubic)."
    ]


def test_the_digest_is_of_the_images_before_resizing_and_of_their_labels(tmp_path: Path) -> None:
    def read(name: str, pixels: np.ndarray, labels: list[int], canvas: int) -> str:
        np.savez(tmp_path / name, images=pixels, labels=labels)
        return read_foreign_images(tmp_path / name, canvas).source_digest

    first = read("a.npz", PIXELS, LABELS, 8)
    assert first == read("b.npz", PIXELS, LABELS, 9)
    assert first != read("c.npz", draw_pixels(1), LABELS, 8)
    assert first != read("d.npz", PIXELS, [*LABELS[::-1][1:], 1], 8)


def test_a_list_of_classes_names_the_label_numbers(tmp_path: Path) -> None:
    content = {"images": to_torch(PIXELS), "labels": torch.tensor(LABELS), "classes": ["bag", "boot", "hat"]}
    torch.save(content, tmp_path / "set.pt")
    assert read_foreign_images(tmp_path / "set.pt", SIDE).class_labels == ["hat", "bag", "boot", "bag", "hat"]


def test_grey_images_and_values_up_to_255_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=PIXELS[..., 0].astype(np.float64), labels=LABELS)
    pixels = read_foreign_images(tmp_path / "set.npz", SIDE).pixels
    assert np.array_equal(pixels, np.repeat(PIXELS[..., :1], 3, axis=-1))


class Command:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch was_here",)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"images": PIXELS}, "without labels"),
    "no images": ({"labels": LABELS}, "no images"),
    "soft labels": ({"images": PIXELS, "labels": np.ones((5, 3)) / 3}, "soft labels"),
    "too few labels": ({"images": PIXELS, "labels": LABELS[1:]}, "5 images, but 4 labels"),
    "negative label": ({"images": PIXELS, "labels": [-1, 0, 1, 0, 1]}, "whole numbers from 0"),
    "label nan": ({"images": PIXELS, "labels": [np.nan, 0, 1, 0, 1]}, "whole numbers from 0"),
    "normalised": ({"images": PIXELS / 64 - 2, "labels": LABELS}, "std + mean"),
    "not a number": ({"images": np.full(PIXELS.shape, np.nan), "labels": LABELS}, "nan"),
    "shape": ({"images": PIXELS[:, :, :, :2], "labels": LABELS}, "shape"),
    "empty": ({"images": PIXELS[:0], "labels": LABELS[:0]}, "no image"),
    "label beyond the list": ({"images": PIXELS, "labels": LABELS, "classes": ["a", "b"]}, "names 2 classes"),
    "pickled objects": ({"images": np.array([Command()]), "labels": [0]}, "may run any code"),
    "pickled labels": ({"images": PIXELS, "labels": np.array([Command()] * 5)}, "may run any code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_other_content_is_refused_in_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays, reason = REFUSED[name]
    np.savez("set.npz", **arrays)
    with pytest.raises(InputError, match=r"set\.npz") as refusal:
        read_foreign_images(Path("set.npz"), SIDE)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not Path("was_here").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"images": to_torch(PIXELS), "labels": Command()}, "may run any code"),
        ({"images": PIXELS, "labels": torch.tensor(LABELS)}, "may run any code"),
        ({"images": torch.zeros(1).expand(10**9, 3, 8, 8), "labels": torch.tensor([0])}, "not a tensor"),
        (to_torch(PIXELS), "as a pair"),
    ],
    ids=["object", "array", "expanded", "tensor"],
)
def test_a_file_of_tensors_runs_no_code_and_holds_what_it_declares(
    tmp_path: Path, content: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "set.pth")
    with pytest.raises(InputError, match=reason):
        read_foreign_images(Path("set.pth"), SIDE)
    assert not Path("was_here").exists()


def test_an_array_that_unpacks_to_gigabytes_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = io.BytesIO()
    declared = {"descr": "|u1", "fortran_order": False, "shape": (40, 4096, 4096, 3)}
    np.lib.format.write_array_header_1_0(header, declared)
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(300):
                member.write(bytes(MIB))
        archive.writestr("labels.npy", b"")
    with pytest.raises(InputError, match="declares"):
        read_foreign_images(tmp_path / "set.npz", SIDE)


def test_more_images_than_their_files_explain_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_image_reader, "MAX_UNCHECKED_BYTES", 4 * SIDE**2 * 3)
    monkeypatch.setattr(foreign_image_reader, "MAX_GROWTH", 0)
    with pytest.raises(InputError, match="more images than are read"):
        read_foreign_images(write_npz(tmp_path), SIDE)


@pytest.mark.parametrize("name", ["set.txt", "empty"])
def test_what_holds_no_images_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.txt").write_text("none")
    with pytest.raises(InputError, match="no run directory"):
        read_foreign_images(tmp_path / name, SIDE)
