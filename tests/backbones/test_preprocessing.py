"""From an image to a backbone's input: as timm does it, whatever the image."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from sfm.backbones.card import Preprocessing
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.preprocessing import preprocessing_from_timm_config, resize_and_crop_image

MEAN = (0.485, 0.456, 0.406)


def make_preprocessing(
    size: int, *, crop_pct: float = 0.875, crop_mode: str = "center", interpolation: str = "bicubic"
) -> Preprocessing:
    config = {
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": MEAN,
        "std": (0.5,) * 3,
    }
    return preprocessing_from_timm_config(config, size)


def make_noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@settings(max_examples=60)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.integers(8, 128),
    crop_pct=st.sampled_from([0.875, 0.882, 0.9, 0.95, 1.0, 1.15]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_preprocessing_matches_the_timm_evaluation_transform(
    width: int, height: int, size: int, crop_pct: float, crop_mode: str, interpolation: str
) -> None:
    assume(max(width, height) <= 100 * min(width, height))
    # Where a side would be rounded to nothing, timm fails.
    assume(crop_mode != "border" or max(width, height) < size * min(width, height))
    image = make_noise_image(width, height)
    rules = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    transform: Any = create_transform((3, size, size), **rules, mean=MEAN, normalize=False)
    got = resize_and_crop_image(image, make_preprocessing(size, **rules))
    np.testing.assert_array_equal(got, transform(image).permute(1, 2, 0).numpy())


def test_the_resize_follows_from_input_size_and_crop_pct() -> None:
    assert make_preprocessing(224).resize == 256
    assert make_preprocessing(96).resize == 109
    assert make_preprocessing(240, crop_pct=0.882).resize == 272
    assert make_preprocessing(224, crop_pct=1.0).resize == 224


def test_an_image_of_extreme_shape_does_not_exhaust_memory() -> None:
    # Resized whole, this one would take 12 GB.
    pixels = resize_and_crop_image(make_noise_image(60_000, 1), make_preprocessing(224))
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_array_equal(
        pixels,
        resize_and_crop_image(
            make_noise_image(60_000, 1).crop((29_900, 0, 30_100, 1)), make_preprocessing(224)
        ),
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_image_mode_is_converted_to_three_channels(mode: str) -> None:
    via = {"RGBa": "RGBA", "LAB": "RGB"}.get(mode, mode)
    image = make_noise_image(40, 30).convert(via)
    if mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    elif via != mode:
        image = image.convert(mode)
    assert image.mode == mode
    pixels = resize_and_crop_image(image, make_preprocessing(16))
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)


def test_grey_images_stay_grey() -> None:
    pixels = resize_and_crop_image(make_noise_image(40, 40).convert("L"), make_preprocessing(16))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_grey_images_match_their_rgb_conversion() -> None:
    grey = make_noise_image(50, 40).convert("L")
    for size in (16, 64):
        np.testing.assert_array_equal(
            resize_and_crop_image(grey, make_preprocessing(size)),
            resize_and_crop_image(grey.convert("RGB"), make_preprocessing(size)),
        )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_is_scaled_not_clipped(dtype: type) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    deep = Image.fromarray((grey.astype(dtype) * 257).astype(dtype))
    np.testing.assert_array_equal(
        resize_and_crop_image(deep, make_preprocessing(24)),
        resize_and_crop_image(Image.fromarray(grey), make_preprocessing(24)),
    )


def test_a_palette_with_transparency_emits_no_warning() -> None:
    image = make_noise_image(32, 32).convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resize_and_crop_image(image, make_preprocessing(16))


def test_pixels_to_tensor_scales_to_between_zero_and_one() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    pixels.setflags(write=False)
    images = pixels_to_tensor(pixels)
    assert (images.shape, images.dtype) == ((2, 3, 5, 5), torch.float32)
    assert (images[0, :, 0, 0] == 0).all()
    assert (images[0, :, 0, 1] == 1).all()
    expected = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images, expected, rtol=0, atol=0)
