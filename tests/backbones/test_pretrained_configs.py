"""Every set of weights that timm knows is fed the pixels that timm evaluates it with, or is refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from sfm.backbones.card import BackboneCard, Preprocessing, describe_backbone_differences
from sfm.backbones.preprocessing import (
    preprocessing_from_timm_config,
    read_square_input_side,
    resize_and_crop_image,
)
from sfm.errors import InputError

# Smaller and larger than inputs, wide and tall; the difference from an input's side is odd and even.
SHAPES = ((61, 97), (360, 31), (333, 401), (530, 1100))


def make_noise_image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def list_distinct_configs() -> dict[str, dict[str, Any]]:
    """Return what timm evaluates its weights with, without what is the same, by one of the weights' names."""
    found: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for name in timm.list_pretrained():
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        fill = config["mean"] if config["crop_mode"] == "border" else None
        pixels = (
            config["input_size"],
            config["crop_mode"],
            config["crop_pct"],
            config["interpolation"],
            fill,
        )
        found.setdefault(pixels, (name, config))
    return dict(found.values())


CONFIGS = list_distinct_configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_match_the_timm_evaluation_or_the_input_is_refused(name: str) -> None:
    config = CONFIGS[name]
    _, rows, columns = config["input_size"]
    if rows != columns:
        with pytest.raises(InputError, match=f"{rows} x {columns} px .*--image-size {min(rows, columns)}"):
            read_square_input_side(config)
        return
    transform: Any = create_transform(**config, normalize=False)
    preprocessing = preprocessing_from_timm_config(config, read_square_input_side(config))
    for height, width in SHAPES:
        image = make_noise_image(height, width)
        expected = transform(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(resize_and_crop_image(image, preprocessing), expected)


def test_the_distinct_configs_cover_every_crop_mode() -> None:
    modes = {preprocessing_from_timm_config(c, c["input_size"][-1]).crop_mode for c in CONFIGS.values()}
    assert modes == {"center", "pad", "squash", "border"}
    assert {c["interpolation"] for c in CONFIGS.values()} == {"bicubic", "bilinear"}


def make_config(**changes: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"crop_mode": "stretch"}, "crop mode 'stretch' is not supported, only center, squash and border"),
        ({"interpolation": "random"}, "interpolation 'random' is not supported, only bilinear, bicubic"),
        ({"input_size": (4, 32, 32)}, "inputs of 4 channels are not supported"),
        ({"mean": (0.5,), "std": (0.5,)}, "inputs of 1 channels are not supported"),
    ],
)
def test_unsupported_preprocessing_configs_are_refused(changes: Mapping[str, Any], answer: str) -> None:
    with pytest.raises(InputError, match=answer):
        preprocessing_from_timm_config(make_config(**changes), 32)


def make_card(preprocessing: Preprocessing) -> BackboneCard:
    return BackboneCard(
        spec="x", model="x", rule="pre-logits", weights="0" * 64, preprocessing=preprocessing, features=1
    )


def test_a_centre_crop_keeps_its_card_and_hash() -> None:
    card = make_card(preprocessing_from_timm_config(make_config(), 32))
    assert card.preprocessing.model_dump() == {
        "input_size": 32,
        "resize": 36,
        "resampling": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    assert card.hash == "d833a356daff69fca54cc0354bba48e64c536ff84a3d2201fe8e2bc45cbd3e17"
    assert BackboneCard.model_validate_json(card.model_dump_json()) == card


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_another_crop_mode_changes_the_hash(mode: str) -> None:
    centre, other = (
        make_card(preprocessing_from_timm_config(make_config(crop_mode=m), 32)) for m in ("center", mode)
    )
    assert centre.hash != other.hash
    assert describe_backbone_differences(centre, other) == [f"the preprocessing (crop_mode center -> {mode})"]
    assert BackboneCard.model_validate_json(other.model_dump_json()) == other


def test_a_padded_input_and_a_shifted_centre_crop_have_different_hashes() -> None:
    # Earlier versions put the image half a pixel elsewhere than timm, and called that a centre crop.
    padded = make_card(preprocessing_from_timm_config(make_config(crop_pct=1.15), 32))
    shifted = make_card(padded.preprocessing.model_copy(update={"crop_mode": "center"}))
    assert padded.hash != shifted.hash


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_images_of_extreme_shape_get_the_input_size(mode: str) -> None:
    preprocessing = preprocessing_from_timm_config(make_config(crop_mode=mode), 32)
    for height, width in ((1, 40_000), (40_000, 1), (1, 1)):
        assert resize_and_crop_image(make_noise_image(height, width), preprocessing).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_grey_images_match_their_rgb_conversion_in_every_crop_mode(mode: str) -> None:
    preprocessing = preprocessing_from_timm_config(make_config(crop_mode=mode, mean=(0.2, 0.5, 0.7)), 32)
    grey = make_noise_image(50, 40).convert("L")
    np.testing.assert_array_equal(
        resize_and_crop_image(grey, preprocessing), resize_and_crop_image(grey.convert("RGB"), preprocessing)
    )
