import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfm.distill.config import DistillConfig
from sfm.distill.distilled_images import make_class_folder_names, write_images
from sfm.distill.preview import draw_preview_png, strip_numbers_and_common_prefix
from sfm.distill.run import distill
from sfm.events import Progress
from sfm.stats_store.digests import compute_array_digest


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (
            ["001.Black_footed_Albatross", "002.Laysan_Albatross"],
            ["Black_footed_Albatross", "Laysan_Albatross"],
        ),
        (["bird/owl", "bird/crow"], ["owl", "crow"]),
        (["class_1", "class_10", "class_2"], ["1", "10", "2"]),
        (["Sandal", "Shirt", "Sneaker"], ["Sandal", "Shirt", "Sneaker"]),
        (["red apple", "red"], ["red apple", "red"]),
        (["1. a", "2. a"], ["1. a", "2. a"]),
        (["bird_owl"], ["bird_owl"]),
        (["a crane", "a crane", "a bird"], ["crane", "crane", "bird"]),
        ([], []),
    ],
)
def test_captions_drop_the_common_prefix_of_all_names(names: list[str], shown: list[str]) -> None:
    assert strip_numbers_and_common_prefix(names) == shown


def draw_sheet(folder: Path, classes: int, ipc: int) -> Image.Image:
    names = [f"a class with number {index} and a name too long for its tile" for index in range(classes)]
    folders = make_class_folder_names(names, names)
    red = np.zeros((12, 12, 3), dtype=np.uint8) + np.array([250, 0, 0], dtype=np.uint8)
    write_images(folder, iter([red] * (classes * ipc)), folders, ipc)
    return Image.open(BytesIO(draw_preview_png(folder, folders, names, "title")))


@pytest.mark.parametrize(("classes", "ipc", "shown"), [(2, 1, 2), (10, 1, 10), (130, 1, 100), (3, 12, 30)])
def test_the_preview_shows_at_most_100_classes_and_10_images_of_each(
    tmp_path: Path, classes: int, ipc: int, shown: int
) -> None:
    picture = np.asarray(draw_sheet(tmp_path, classes, ipc)).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1:].max(-1) < 50)
    assert red.sum() == shown * 128 * 128
    written = picture.max(-1) < 120
    assert written.any(), "there are labels"
    assert not written[:, :20].any(), "labels stay inside the margins"
    assert not written[:, -20:].any()


HOSTILE_NAMES = ["cat\nFelis", "pets[/raw]\x1b[2J", "safe\u202etxt.exe", "x" * 1_000_000, "猫", ""]


@pytest.mark.parametrize("ipc", [1, 2])
def test_any_class_name_gives_a_one_line_caption(tmp_path: Path, ipc: int) -> None:
    folders = make_class_folder_names(HOSTILE_NAMES, HOSTILE_NAMES)
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    write_images(tmp_path, iter([grey] * (len(HOSTILE_NAMES) * ipc)), folders, ipc)
    data = draw_preview_png(tmp_path, folders, HOSTILE_NAMES, "a title\nof two lines")
    plain = draw_preview_png(tmp_path, folders, ["a name"] * len(HOSTILE_NAMES), "a title")
    with Image.open(BytesIO(data)) as sheet, Image.open(BytesIO(plain)) as other:
        assert sheet.size == other.size


def read_sheets(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "growth").iterdir())}


def test_a_growth_sheet_is_written_at_the_end_of_every_level(config: DistillConfig) -> None:
    distill(config)
    assert list(read_sheets(config.out)) == [f"step_{step:08d}.png" for step in (1, 2, 3, 4, 5, 6, 12)]


def test_the_last_growth_sheet_shows_the_first_image_of_every_class(config: DistillConfig) -> None:
    distill(config.model_copy(update={"ipc": 2}))
    files = sorted((config.out / "images").glob("*/0.png"))
    with Image.open(config.out / "growth" / "step_00000012.png") as sheet:
        shown = np.asarray(sheet)
    assert len(files) == 4
    assert (shown == np.concatenate([np.asarray(Image.open(file)) for file in files], axis=1)).all()


def test_a_resumed_run_writes_identical_growth_sheets(config: DistillConfig, tmp_path: Path) -> None:
    whole = config.model_copy(update={"out": tmp_path / "whole", "checkpoint_every": 3})
    broken = whole.model_copy(update={"out": tmp_path / "broken"})
    distill(whole)

    def crash_at_step_5(event: Progress) -> None:
        if event.done == 5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        distill(broken, crash_at_step_5)
    distill(broken.model_copy(update={"resume": True}))
    assert read_sheets(broken.out) == read_sheets(whole.out)


def test_run_record_holds_the_digest_of_the_written_pixels(config: DistillConfig) -> None:
    distill(config.model_copy(update={"ipc": 2}))
    files = sorted((config.out / "images").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    assert json.loads((config.out / "run.json").read_text())["images"] == compute_array_digest(pixels)
