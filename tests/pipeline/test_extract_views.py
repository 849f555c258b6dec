"""``--views`` trains the classifier on augmented views, and changes no other array."""

import numpy as np
import pytest
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.crops import Crops
from sfm.backbones.preprocessing import crop_image_views, resize_and_crop_image
from sfm.pipeline.decoding import draw_and_crop_views
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.stats_store.store import open_store

SQUARE = Preprocessing(input_size=20, resize=20, resampling="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def make_crops(*rows: tuple[float, float, float, float, bool]) -> Crops:
    """Crops from rows of top, left, height, width, flip."""
    top, left, height, width, flip = (np.array(column) for column in zip(*rows, strict=True))
    return Crops(top, left, height, width, flip)


@pytest.fixture
def picture() -> Image.Image:
    """A wide image of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_the_full_crop_equals_the_preprocessed_image(picture):
    square = picture.crop((10, 0, 50, 40))
    seen = crop_image_views(picture, SQUARE, make_crops((0, 0, 1, 1, False), (0, 0, 1, 1, True)))
    np.testing.assert_array_equal(seen[0], resize_and_crop_image(square, SQUARE))
    np.testing.assert_array_equal(seen[1], seen[0][:, ::-1])


def test_a_crop_is_cut_out_of_the_centre_square(picture):
    (seen,) = crop_image_views(picture, SQUARE, make_crops((0.5, 0.25, 0.5, 0.5, False)))
    np.testing.assert_array_equal(seen, np.asarray(picture)[20:40, 20:40])


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 4000)])
def test_very_small_images_have_views(size):
    seen = draw_and_crop_views(Image.new("L", size, 77), bytes(32), SQUARE, view_count=5, seed=0)
    assert seen.shape == (5, 20, 20, 3)
    assert (seen == 77).all()


def test_views_depend_only_on_the_image_and_the_seed(picture):
    first = draw_and_crop_views(picture, b"a" * 32, SQUARE, view_count=3, seed=0)
    np.testing.assert_array_equal(
        first, draw_and_crop_views(picture, b"a" * 32, SQUARE, view_count=3, seed=0)
    )
    other_image = draw_and_crop_views(picture, b"b" * 32, SQUARE, view_count=3, seed=0)
    other_seed = draw_and_crop_views(picture, b"a" * 32, SQUARE, view_count=3, seed=1)
    for i in range(3):
        assert not np.array_equal(first[i], other_image[i])
        assert not np.array_equal(first[i], other_seed[i])


def make_config(store, **options) -> ExtractConfig:
    given = {
        "source": "builtin:fashion-mnist-6k",
        "store": str(store),
        "backbone": ["lite0"],
        "image_size": 32,
        "limit_per_class": 10,
        "sub_classes": (2,),
        "keep_train_features": True,
    }
    return ExtractConfig(**{**given, **options})


def read_arrays(store) -> dict[str, np.ndarray]:
    opened = open_store(str(store))
    entry = opened.open_entry(opened.list_summaries()[0])
    return {name: entry.read_array(name) for name in entry.list_array_names()}


def test_views_change_only_the_classifier(tmp_path):
    (plain,) = extract(make_config(tmp_path / "plain")).published
    (seen,) = extract(make_config(tmp_path / "views", views=2)).published
    assert seen.summary.options != plain.summary.options
    without, with_views = read_arrays(tmp_path / "plain"), read_arrays(tmp_path / "views")
    assert without.keys() == with_views.keys()
    for name in without:
        same = np.array_equal(without[name], with_views[name], equal_nan=without[name].dtype.kind == "f")
        assert same == (not name.startswith("classifier/")), name


@pytest.mark.slow
def test_a_killed_extraction_with_views_resumes(tmp_path):
    (whole,) = extract(make_config(tmp_path / "whole", views=1)).published

    class KilledError(Exception):
        pass

    def kill(event):
        if event.stage.startswith("statistics"):
            raise KilledError

    with pytest.raises(KilledError):
        extract(make_config(tmp_path / "cut", views=1), kill)
    resumed = extract(make_config(tmp_path / "cut", views=1))
    assert resumed.pass_summary.images_read == 0
    assert resumed.published[0].summary.entry_digest == whole.summary.entry_digest
