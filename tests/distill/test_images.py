import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfm.distill.images import class_folders, pixels, preview, slug, write_images
from sfm.distill.pyramid import decode, grow, resolutions


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("T-shirt/top", "t-shirt-top"),
        ("tench, Tinca tinca", "tench-tinca-tinca"),
        ("  Crème  Brûlée! ", "creme-brulee"),
        ("../../etc/passwd", "etc-passwd"),
        ("猫", ""),
    ],
)
def test_a_slug_is_a_name_in_plain_letters(name: str, short: str) -> None:
    assert slug(name) == short


@given(st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80)), min_size=1, max_size=120))
def test_folders_sort_in_the_order_of_the_classes_and_are_safe_on_any_disk(
    classes: list[tuple[str, str]],
) -> None:
    folders = class_folders([class_id for class_id, _ in classes], [name for _, name in classes])
    assert sorted(folders) == folders
    assert len(set(folders)) == len(classes)
    assert all(re.fullmatch(r"\d+(_[a-z0-9-]{1,48})?", folder) for folder in folders)


def test_classes_of_the_same_display_name_stay_apart() -> None:
    assert class_folders(["n1", "n2"], ["crane", "crane"]) == ["0_crane", "1_crane"]


def test_a_name_without_letters_gives_way_to_the_class_id() -> None:
    assert class_folders(["n02123045", "猫"], ["猫", "猫"]) == ["0_n02123045", "1"]


def test_files_hold_the_decoded_pyramids_rounded_to_eight_bits(tmp_path: Path) -> None:
    levels: list[torch.Tensor] = []
    for resolution in resolutions(20):
        levels = grow(levels, resolution, 70, 0, torch.device("cpu"))
    write_images(tmp_path, pixels(levels, 20), class_folders(["a"] * 7, ["a"] * 7), 10)
    wanted = decode(levels, 20).detach().permute(0, 2, 3, 1).numpy() * 255
    for index in (0, 9, 10, 63, 64, 69):
        with Image.open(tmp_path / f"{index // 10}_a" / f"{index % 10}.png") as image:
            assert np.abs(np.asarray(image, dtype=float) - wanted[index]).max() <= 0.5 + 1e-3


def sheet(folder: Path, classes: int, ipc: int) -> Image.Image:
    names = [f"a class with number {index} and a name too long for its tile" for index in range(classes)]
    folders = class_folders(names, names)
    red = np.zeros((12, 12, 3), dtype=np.uint8) + np.array([250, 0, 0], dtype=np.uint8)
    write_images(folder, iter([red] * (classes * ipc)), folders, ipc)
    return Image.open(BytesIO(preview(folder, folders, names, "title")))


@pytest.mark.parametrize(("classes", "ipc", "shown"), [(2, 1, 2), (10, 1, 10), (130, 1, 100), (3, 12, 30)])
def test_the_preview_shows_the_first_hundred_classes_and_ten_images_of_each(
    tmp_path: Path, classes: int, ipc: int, shown: int
) -> None:
    picture = np.asarray(sheet(tmp_path, classes, ipc)).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1:].max(-1) < 50)
    assert red.sum() == shown * 128 * 128
    written = picture.max(-1) < 120
    assert written.any(), "there are labels"
    assert not written[:, :20].any(), "labels stay inside the margins"
    assert not written[:, -20:].any()


HOSTILE = ["cat\nFelis", "pets[/raw]\x1b[2J", "safe\u202etxt.exe", "x" * 1_000_000, "猫", ""]


@pytest.mark.parametrize("ipc", [1, 2])
def test_any_name_has_a_caption_of_one_line(tmp_path: Path, ipc: int) -> None:
    folders = class_folders(HOSTILE, HOSTILE)
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    write_images(tmp_path, iter([grey] * (len(HOSTILE) * ipc)), folders, ipc)
    data = preview(tmp_path, folders, HOSTILE, "a title\nof two lines")
    plain = preview(tmp_path, folders, ["a name"] * len(HOSTILE), "a title")
    with Image.open(BytesIO(data)) as sheet, Image.open(BytesIO(plain)) as other:
        assert sheet.size == other.size
