"""Clip art becomes a dataset whose held-out subjects are not in the training split."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from clipart_dataset import (
    MAX_PER_CLASS,
    Drawing,
    choose_splits,
    list_drawings,
    name_series,
    render_drawing,
    select_classes,
    write_clipart_dataset,
)
from PIL import Image

SERIES = ("wren", "owl", "crow", "tit", "gull", "hen", "duck", "swan", "kite", "robin")


def draw(folder: Path, name: str, colour: int) -> Path:
    """A small drawing with a transparent border, of a colour that no other number gives."""
    pixels = np.zeros((6, 4, 4), np.uint8)
    pixels[1:5, 1:3] = (colour % 256, colour // 256, 99, 255)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder / f"{name}.png"


@pytest.fixture(scope="module")
def clipart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 50 drawings in ten series each, which they share; three tools; unsorted ones."""
    root = tmp_path_factory.mktemp("clipart")
    for class_index, name in enumerate(("animals/birds", "plants/small")):
        for index in range(50):
            stem = f"{SERIES[index % 10].title()}_{index:02d}"
            draw(root / name, stem, 100 * class_index + index)
    for index in range(3):
        draw(root / "tools", f"thing_{index}", 500 + index)
    for index in range(50):
        draw(root / "unsorted", f"thing_{index}", 600 + index)
    return root


def list_series_by_split(dataset: Path) -> dict[str, set[str]]:
    return {
        split: {re.split(r"_", file.name.lower())[0] for file in (dataset / split).rglob("*.png")}
        for split in ("train", "test")
    }


def test_no_series_is_in_both_splits_not_even_in_several_classes(clipart: Path, tmp_path: Path) -> None:
    counts = write_clipart_dataset(clipart, tmp_path / "dataset")
    series = list_series_by_split(tmp_path / "dataset")
    assert series["train"] | series["test"] == set(SERIES)
    assert series["train"].isdisjoint(series["test"])
    assert all(series.values())
    # A class with too few drawings is left out.
    assert counts.keys() == {"animals-birds", "plants"}
    assert [sum(by_split.values()) for by_split in counts.values()] == [50, 50]
    assert {path.name for path in (tmp_path / "dataset" / "test").iterdir()} == counts.keys()


def test_the_same_drawings_elsewhere_make_the_same_dataset(clipart: Path, tmp_path: Path) -> None:
    shutil.copytree(clipart, tmp_path / "copy")
    splits = [
        {
            split: [(each.class_name, each.digest) for each in drawings]
            for split, drawings in choose_splits(list_drawings(folder)).items()
        }
        for folder in (clipart, tmp_path / "copy")
    ]
    assert splits[0] == splits[1]


def test_of_equal_drawings_one_is_kept_and_none_if_their_classes_differ(tmp_path: Path) -> None:
    draw(tmp_path / "plants", "owl_01", 1)
    draw(tmp_path / "plants", "owl_02", 1)
    draw(tmp_path / "plants", "kite", 2)
    draw(tmp_path / "tools", "kite", 2)
    assert [drawing.path.name for drawing in list_drawings(tmp_path)] == ["owl_01.png"]


def test_a_series_shares_as_many_words_as_leave_it_a_fifth_of_its_class() -> None:
    names = ["star_5pt_01", "star_5pt_02", "star-6pt", "Owl 1", "owl_b", "kite", "wren", "tit", "gull", "hen"]
    drawings = [Drawing(Path(f"{name}.png"), "shapes", "") for name in names]
    assert name_series(drawings)[:5] == ["star 5", "star 5", "star 6", "owl", "owl"]


def test_a_drawing_fills_the_height_of_a_white_square(tmp_path: Path) -> None:
    # Without its border it is twice as high as wide.
    pixels = np.array(render_drawing(draw(tmp_path, "owl", 7)))
    drawn = np.argwhere((pixels != 255).any(axis=2))
    assert pixels.shape == (256, 256, 3)
    assert drawn.min(axis=0).tolist() == [0, 64]
    assert drawn.max(axis=0).tolist() == [255, 191]
    assert pixels[100, 100].tolist() == [7, 0, 99]


def test_an_empty_drawing_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 5)).save(tmp_path / "nothing.png")
    assert (np.array(render_drawing(tmp_path / "nothing.png")) == 255).all()


def test_a_large_class_is_cut_and_keeps_its_share_of_held_out_drawings(clipart: Path) -> None:
    (drawing, *_) = list_drawings(clipart)
    many = {"train": [drawing] * 450, "test": [drawing] * 150}
    (by_split,) = select_classes(many).values()
    assert {split: len(own) for split, own in by_split.items()} == {
        "train": MAX_PER_CLASS * 3 // 4,
        "test": round(MAX_PER_CLASS / 4),
    }
