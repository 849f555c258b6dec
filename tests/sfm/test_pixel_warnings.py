"""What an extraction says of images that were composited or are dark: a line each, with count and name."""

from sfm.pixel_warnings import list_composited_and_dark_image_warnings
from sfm.stats_store.cards import ExtractionCard, Summary


def make_entry(role: str = "full", **words: object) -> tuple[Summary, ExtractionCard]:
    options = {"background": "white"} if words.get("composited") else {}
    card = ExtractionCard(
        options=options,
        role=role,
        versions={},
        device="cpu",
        threads=1,
        seconds=1,
        images_per_second=1,
        **words,
    )
    summary = Summary(
        **dict.fromkeys(("dataset", "backbone", "model"), "x"),
        **dict.fromkeys(("backbone_hash", "fingerprint", "options", "entry_digest"), "0" * 64),
        **dict.fromkeys(("image_size", "classes", "features", "generation"), 1),
        **{"role": role, "train_samples": 20, "test_samples": 10, "held_out_top1": None},
        created="now",
    )
    return summary, card


def test_opaque_images_give_no_warning():
    assert list(list_composited_and_dark_image_warnings([make_entry(composited=0, dark=0)])) == []


def test_pixel_warnings_are_merged_over_backbones_and_separate_by_role():
    full = make_entry(composited=7, composited_example="icons/a.png", dark=0)
    tuning = make_entry("tuning", composited=4, composited_example="icons/a.png", dark=0)
    lines = list(list_composited_and_dark_image_warnings([full, tuning, full, tuning]))
    assert lines == [
        "7 of 30 images are not fully opaque (such as icons/a.png): composited over white; choose with "
        "DATASET?background=white, black or #rrggbb",
        "4 of 30 images of the tuning entry are not fully opaque (such as icons/a.png): composited over "
        "white; choose with DATASET?background=white, black or #rrggbb",
    ]


def test_dark_images_give_a_warning_with_an_example_and_a_remedy():
    (line,) = list_composited_and_dark_image_warnings(
        [make_entry(composited=0, dark=3, dark_example="cells/1.tif")]
    )
    assert "3 of 30 images" in line
    assert "(such as cells/1.tif)" in line
    assert line.endswith("as in DATASET?white=4095")
