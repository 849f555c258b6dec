"""Transparent and deep images through an extraction: what is in the entry, in its key, and in the counts."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sfm.backbones.card import Preprocessing
from sfm.backbones.rendering import Rendering
from sfm.errors import InputError
from sfm.pipeline.decoding import DecodingOptions, decode_batch
from sfm.pipeline.decoding_processes import CHUNK_IMAGES, decoding_process_pool
from sfm.pipeline.dry_run import estimate_extraction
from sfm.pipeline.entry import make_extraction_card
from sfm.pipeline.extract import ExtractionResult, extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import SOURCE_KINDS, open_source
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.sample import Sample
from sfm.stats_store.store import open_store

TRAIN, TEST = 4, 2
TOTAL_IMAGES = 2 * (TRAIN + TEST)


def draw_image(shape: str, number: int, mode: str = "RGBA") -> Image.Image:
    """A black shape on nothing, or on white if the mode has no transparency."""
    clear = (0, 0, 0, 0) if mode == "RGBA" else (255, 255, 255)
    image = Image.new(mode, (40, 40), clear)
    draw = getattr(ImageDraw.Draw(image), shape)
    draw([4 + number, 4, 30 + number, 30], fill="black")
    return image


def write_dataset(root: Path, mode: str = "RGBA") -> Path:
    for split, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        for shape in ("ellipse", "rectangle"):
            folder = root / split / shape
            folder.mkdir(parents=True)
            for number in numbers:
                draw_image(shape, number, mode).save(folder / f"{number}.png")
    return root


def run_extraction(store: Path, source: str, **options: object) -> ExtractionResult:
    given = {"image_size": 32, "backbone": ["lite0"], "sub_classes": (2,)} | options
    return extract(ExtractConfig(source=source, store=str(store), **given))


def read_arrays(store: Path, done: ExtractionResult) -> dict[str, np.ndarray]:
    entry = open_store(str(store)).open_entry(done.published[0].summary)
    return {name: entry.read_array(name) for name in entry.list_array_names()}


@pytest.mark.slow
def test_transparent_images_are_composited_and_the_background_is_in_the_key(tmp_path):
    source, store = f"folder:{write_dataset(tmp_path / 'icons')}", tmp_path / "s"
    white = run_extraction(store, source, exemplars=2)
    (card,) = white.cards
    assert (card.composited, card.options["background"]) == (TOTAL_IMAGES, "white")
    assert card.composited_example == f"{tmp_path}/icons/train/ellipse/0.png"
    assert (read_arrays(store, white)["exemplar/image"][:, :, 0, 0] == 255).all()
    # The same pixels as of images that are on white already.
    flat = run_extraction(store, f"folder:{write_dataset(tmp_path / 'flat', 'RGB')}", exemplars=2)
    assert flat.cards[0].composited == 0
    for name, array in read_arrays(store, white).items():
        np.testing.assert_array_equal(array, read_arrays(store, flat)[name])
    red = run_extraction(store, f"{source}?background=#ff0000", exemplars=2)
    assert red.published[0].outcome == "published"
    assert (read_arrays(store, red)["exemplar/image"][:, :, 0, 0] == [255, 0, 0]).all()
    assert red.published[0].summary.fingerprint == white.published[0].summary.fingerprint
    for again, first in (("", white), ("?background=#FFFFFF", white), ("?background=#ff0000", red)):
        repeat = run_extraction(store, source + again, exemplars=2)
        assert (repeat.pass_summary.images_read, repeat.published[0].summary) == (
            0,
            first.published[0].summary,
        )
        assert repeat.cards == first.cards


def test_opaque_images_have_the_same_key_over_any_background(tmp_path):
    root = write_dataset(tmp_path / "icons", "RGB")
    for file in root.rglob("*.png"):
        Image.open(file).convert("RGBA").save(file)
    first = run_extraction(tmp_path / "s", f"folder:{root}")
    assert first.cards[0].composited == 0
    assert first.cards[0].options == {
        "origin": "extracted",
        "role": "full",
        "sub_classes": [2],
        "exemplars": 0,
        "keep_train_features": False,
        "no_held_out": False,
        "limit_per_class": None,
        "tune_fraction": None,
        "seed": 0,
        "precision": "float32",
        "views": 1,
    }
    again = run_extraction(tmp_path / "s", f"folder:{root}?background=black")
    assert (again.pass_summary.images_read, again.published[0].summary) == (0, first.published[0].summary)
    reread = run_extraction(tmp_path / "s", f"folder:{root}?background=black", rehash=True)
    assert (reread.published[0].outcome, reread.pass_summary.images_read) == ("already there", TOTAL_IMAGES)


@pytest.fixture
def extract_as_earlier_version(monkeypatch):
    """Extract as versions did that dropped transparency: neither card nor key tells."""

    def extracted(*given, **options: object) -> ExtractionResult:
        def card(*words):
            made = make_extraction_card(*words)
            kept = {name: value for name, value in made.options.items() if name != "background"}
            return made.model_copy(update={"options": kept, "composited": None, "dark": None})

        with monkeypatch.context() as patch:
            patch.setattr("sfm.pipeline.entry.make_extraction_card", card)
            return run_extraction(*given, **options)

    return extracted


def test_an_entry_that_dropped_transparency_is_reported_with_the_removal_command(
    tmp_path, extract_as_earlier_version
):
    source, store = f"folder:{write_dataset(tmp_path / 'icons')}", tmp_path / "s"
    old = extract_as_earlier_version(store, source).published[0].summary
    pin = f"icons@{old.entry_digest[:12]}"
    removal = f"sfm store rm {store} {pin}"
    found = run_extraction(store, source)
    assert (found.pass_summary.images_read, found.published[0].summary) == (0, old)
    (note,) = found.notes
    assert note.startswith(f"{pin} is of an earlier version, which dropped transparency: if images may")
    assert "--rehash" in note
    assert note.endswith(removal)
    for options in ({"rehash": True}, {}):
        new = run_extraction(store, source, **options)
        assert (new.published[0].summary == old, new.cards[0].composited) == (False, TOTAL_IMAGES)
        (note,) = new.notes
        assert note.startswith(f"{pin} is of the same images")
        assert note.endswith(removal)


@pytest.mark.parametrize("background", ["white", "black"])
def test_an_entry_that_dropped_transparency_is_not_reused_with_a_background(
    tmp_path, extract_as_earlier_version, background
):
    source, store = f"folder:{write_dataset(tmp_path / 'icons')}", tmp_path / "s"
    extract_as_earlier_version(store, source)
    done = run_extraction(store, f"{source}?background={background}")
    assert (done.pass_summary.images_read, done.published[0].outcome) == (TOTAL_IMAGES, "published")
    assert done.cards[0].options["background"] == background


def test_opaque_images_of_an_earlier_entry_give_no_note_once_read_again(tmp_path, extract_as_earlier_version):
    source, store = f"folder:{write_dataset(tmp_path / 'icons', 'RGB')}", tmp_path / "s"
    old = extract_as_earlier_version(store, source)
    reread = run_extraction(store, source, rehash=True)
    assert (reread.published[0].outcome, reread.published[0].summary) == (
        "already there",
        old.published[0].summary,
    )
    assert (reread.cards[0].composited, reread.cards[0].dark, reread.notes) == (0, 0, ())


@pytest.mark.slow
def test_full_and_tuning_entries_each_count_their_own_images(tmp_path):
    root, store = write_dataset(tmp_path / "icons", "RGB"), tmp_path / "s"
    draw_image("ellipse", TRAIN).save(root / "test" / "ellipse" / f"{TRAIN}.png")
    done = run_extraction(store, f"folder:{root}", tune_fraction=0.5)
    full, tuning = done.cards
    assert (full.role, full.composited, full.options["background"]) == ("full", 1, "white")
    assert full.composited_example.endswith(f"test/ellipse/{TRAIN}.png")
    assert (tuning.role, tuning.composited, "background" in tuning.options) == ("tuning", 0, False)
    assert run_extraction(store, f"folder:{root}", tune_fraction=0.5).pass_summary.images_read == 0
    assert (
        run_extraction(store, f"folder:{root}?background=black", tune_fraction=0.5).pass_summary.images_read
        == TOTAL_IMAGES
    )


def test_images_held_out_of_the_training_split_are_counted_once(tmp_path):
    root = write_dataset(tmp_path / "icons")
    shutil.rmtree(root / "test")
    (card,) = run_extraction(tmp_path / "s", f"folder:{root}", hold_out=0.5).cards
    assert (card.composited, card.options["background"]) == (2 * TRAIN, "white")


def test_images_read_by_an_interrupted_run_are_counted(tmp_path, monkeypatch):
    source, store, broken = f"flaky:{write_dataset(tmp_path / 'icons')}", tmp_path / "s", [True]

    def flaky(text: str):
        inner = SOURCE_KINDS["folder"](text)

        def decode(data: bytes) -> Image.Image:
            image = decode_image(data)
            if broken and data == (tmp_path / "icons/test/rectangle/5.png").read_bytes():
                raise OSError("not now")
            return image

        return type(inner)(**(vars(inner) | {"spec": f"flaky:{text}", "decode": decode}))

    monkeypatch.setitem(SOURCE_KINDS, "flaky", flaky)
    with pytest.raises(InputError, match="not now"):
        run_extraction(store, source)
    broken.clear()
    done = run_extraction(store, source)
    assert (done.pass_summary.images_resumed, done.pass_summary.images_read) == (2 * TRAIN, 2 * TEST)
    assert done.cards[0].composited == TOTAL_IMAGES
    assert done.cards[0].composited_example.endswith("train/ellipse/0.png")


def test_only_selected_images_of_shards_are_counted(tmp_path):
    for split, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as shard:
            for shape in ("ellipse", "rectangle"):
                for number in numbers:
                    file = io.BytesIO()
                    draw_image(shape, number, "RGB" if number == 0 else "RGBA").save(file, "PNG")
                    for end, data in (("png", file.getvalue()), ("cls", shape.encode())):
                        info = tarfile.TarInfo(f"{shape}-{number}.{end}")
                        info.size = len(data)
                        shard.addfile(info, io.BytesIO(data))
    done = run_extraction(tmp_path / "s", f"wds:{tmp_path}?background=black", limit_per_class=2)
    assert done.cards[0].options["background"] == "black"
    assert done.cards[0].composited == 2 * (1 + 2)
    assert done.cards[0].composited_example.startswith("ellipse-1 in ")


@pytest.mark.parametrize("count", [3, CHUNK_IMAGES + 2])
def test_decoding_processes_composite_and_count_as_the_caller_does(count):
    batch = []
    for place in range(count):
        file = io.BytesIO()
        draw_image("ellipse", place % 7, "RGBA" if place % 2 else "RGB").save(file, "PNG")
        batch.append((place + 5, Sample(file.getvalue(), "a", f"{place}.png")))
    rule = Preprocessing(input_size=24, resize=24, resampling="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    wanted = DecodingOptions((rule,), views=1, rendering=Rendering("#00ff00"))
    here = decode_batch(batch, decode_image, wanted)
    with decoding_process_pool(decode_image, 2, 1) as decoding, decoding(batch, wanted) as there:
        assert (
            there.image_mark_locations
            == here.image_mark_locations
            == {"composited": {p + 5: f"{p}.png" for p in range(1, count, 2)}}
        )
        np.testing.assert_array_equal(there.pixels[rule], here.pixels[rule])
    assert (here.pixels[rule][0, 1, 0, 0] == [0, 255, 0]).all()
    assert (here.pixels[rule][1, 1] == [0, 255, 0]).all(axis=-1).any()


def write_deep_images(root: Path, top: int) -> Path:
    for split, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        for shape in ("ellipse", "rectangle"):
            (root / split / shape).mkdir(parents=True)
            for number in numbers:
                grey = np.asarray(draw_image(shape, number, "RGB").convert("L"), dtype=np.float64)
                image = Image.fromarray((grey * top / 255).astype(np.uint16))
                image.save(root / split / shape / f"{number}.tif")
    return root


def test_dark_deep_images_are_reported_and_the_white_option_brightens_them(tmp_path):
    root, store = write_deep_images(tmp_path / "cells", 4095), tmp_path / "s"
    dark = run_extraction(store, f"folder:{root}", exemplars=2)
    assert dark.cards[0].dark == TOTAL_IMAGES
    assert dark.cards[0].dark_example.endswith("train/ellipse/0.tif")
    assert read_arrays(store, dark)["exemplar/image"].max() < 20
    bright = run_extraction(store, f"folder:{root}?white=4095", exemplars=2)
    assert (bright.published[0].outcome, bright.cards[0].dark) == ("published", 0)
    assert bright.cards[0].options["white"] == 4095
    assert read_arrays(store, bright)["exemplar/image"].max() == 255
    assert run_extraction(store, f"folder:{root}?white=4095.0", exemplars=2).pass_summary.images_read == 0
    with pytest.raises(
        InputError, match=r"cannot decode .*\.tif: it has pixels from 0 to 4095, beyond 0 to white=99"
    ):
        run_extraction(store, f"folder:{root}?white=99")


def test_a_dry_run_reports_composited_and_dark_images(tmp_path):
    planned = estimate_extraction(
        ExtractConfig(
            source=f"folder:{write_dataset(tmp_path / 'icons')}",
            store=str(tmp_path / "s"),
            backbone=["lite0"],
            image_size=32,
            dry_run=True,
        )
    )
    assert (planned.probed, planned.composited, planned.dark) == (2 * TRAIN, 2 * TRAIN, 0)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("background=pink", "background=pink is no colour: write background=white, black or #rrggbb"),
        ("white=bright", "white=bright is no brightness"),
        ("background=black&background=white", "background is given twice"),
    ],
)
def test_every_source_accepts_pixel_options_and_refuses_invalid_ones(tmp_path, option, complaint):
    for source in (f"folder:{write_dataset(tmp_path / 'icons')}", "builtin:fashion-mnist-6k"):
        with pytest.raises(InputError, match=complaint):
            open_source(f"{source}?{option}")
        opened = open_source(f"{source}?background=#ff0000&white=4095")
        assert opened.rendering == Rendering("#ff0000", 4095)
        assert opened.name in ("icons", "fashion-mnist-6k")
