import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfm.distill.distilled_images import (
    iterate_decoded_pixels,
    make_class_folder_names,
    make_slug,
    write_images,
)
from sfm.distill.pyramid import append_noise_level_and_rescale, decode_pyramid, list_level_resolutions


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
def test_make_slug_reduces_a_name_to_ascii(name: str, short: str) -> None:
    assert make_slug(name) == short


@given(st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80)), min_size=1, max_size=120))
def test_class_folder_names_sort_in_class_order_and_are_portable(
    classes: list[tuple[str, str]],
) -> None:
    folders = make_class_folder_names([class_id for class_id, _ in classes], [name for _, name in classes])
    assert sorted(folders) == folders
    assert len(set(folders)) == len(classes)
    assert all(re.fullmatch(r"\d+(_[a-z0-9-]{1,48})?", folder) for folder in folders)


def test_classes_with_the_same_display_name_get_distinct_folders() -> None:
    assert make_class_folder_names(["n1", "n2"], ["crane", "crane"]) == ["0_crane", "1_crane"]


def test_a_name_without_ascii_letters_falls_back_to_the_class_id() -> None:
    assert make_class_folder_names(["n02123045", "猫"], ["猫", "猫"]) == ["0_n02123045", "1"]


def test_image_files_hold_the_decoded_pyramid_rounded_to_uint8(tmp_path: Path) -> None:
    levels: list[torch.Tensor] = []
    for resolution in list_level_resolutions(20):
        levels = append_noise_level_and_rescale(levels, resolution, 70, 0, torch.device("cpu"))
    write_images(
        tmp_path, iterate_decoded_pixels(levels, 20), make_class_folder_names(["a"] * 7, ["a"] * 7), 10
    )
    wanted = decode_pyramid(levels, 20).detach().permute(0, 2, 3, 1).numpy() * 255
    for index in (0, 9, 10, 63, 64, 69):
        with Image.open(tmp_path / f"{index // 10}_a" / f"{index % 10}.png") as image:
            assert np.abs(np.asarray(image, dtype=float) - wanted[index]).max() <= 0.5 + 1e-3
