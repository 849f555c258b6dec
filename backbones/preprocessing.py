"""Resize and crop images to a backbone's input, as 8-bit pixels. Imports no torch: decoders need none."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.crops import Crops
from sfm.backbones.rendering import render_image
from sfm.errors import InputError

_RESAMPLING_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Longer images are cropped first: resizing a line of pixels would fill the memory.
_MAX_ASPECT = 100


def preprocessing_from_timm_config(timm_config: Mapping[str, Any], image_size: int) -> Preprocessing:
    """Derive the preprocessing from timm's configuration of a set of weights.

    Parameters
    ----------
    timm_config : mapping
        timm's data configuration: ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``.
    image_size : int
        Side of the backbone's input, in pixels.

    Returns
    -------
    Preprocessing
        The crop keeps the share of the image that the weights are evaluated with, rounded as in timm.

    Raises
    ------
    InputError
        If the preprocessing of the weights is not supported.
    """
    crop_mode, interpolation = timm_config.get("crop_mode", "center"), timm_config["interpolation"]
    if crop_mode not in ("center", "squash", "border"):
        raise InputError(f"crop mode '{crop_mode}' is not supported, only center, squash and border")
    if interpolation not in _RESAMPLING_FILTERS:
        raise InputError(
            f"interpolation '{interpolation}' is not supported, only {', '.join(_RESAMPLING_FILTERS)}"
        )
    channels = {timm_config.get("input_size", (3,))[0], len(timm_config["mean"]), len(timm_config["std"])}
    if channels != {3}:
        raise InputError(f"inputs of {max(channels - {3})} channels are not supported, only of 3")
    resize = math.floor(image_size / timm_config["crop_pct"])
    return Preprocessing(
        input_size=image_size,
        resize=resize,
        resampling=interpolation,
        mean=timm_config["mean"],
        std=timm_config["std"],
        crop_mode="pad" if crop_mode == "center" and resize < image_size else crop_mode,
    )


def read_square_input_side(timm_config: Mapping[str, Any]) -> int:
    """Return the side of the input in timm's configuration of a set of weights.

    Raises
    ------
    InputError
        If the input is not square.
    """
    _, rows, columns = timm_config["input_size"]
    if rows != columns:
        raise InputError(
            f"inputs of {rows} x {columns} px (rows x columns) are not supported, only square ones: "
            f"give --image-size, for example --image-size {min(rows, columns)}"
        )
    return int(columns)


def resize_and_crop_image(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize an image and cut out the centre, as timm does for evaluation.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode; rendered as opaque 8-bit pixels, by default over white.
    preprocessing : Preprocessing

    Returns
    -------
    ndarray of uint8, shape (input_size, input_size, 3)
        Red, green, blue.
    """
    image = render_image(image).image
    shorter = min(image.size)
    if preprocessing.crop_mode in ("center", "pad") and max(image.size) > _MAX_ASPECT * shorter:
        image = _crop_centre(image, *(min(length, _MAX_ASPECT * shorter) for length in image.size))
    resized = image.resize(
        _compute_resized_width_height(image.size, preprocessing),
        _RESAMPLING_FILTERS[preprocessing.resampling],
    )
    return np.asarray(_pad_and_crop_centre(resized, preprocessing).convert("RGB"))


def _compute_resized_width_height(
    image_width_height: tuple[int, int], preprocessing: Preprocessing
) -> tuple[int, int]:
    """Return the width and height to which an image of a given size is resized, rounded as in timm."""
    side, (width, height) = preprocessing.resize, image_width_height
    if preprocessing.crop_mode == "squash":
        return side, side
    if preprocessing.crop_mode == "border":
        ratio = max(width / side, height / side)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    return side * width // min(image_width_height), side * height // min(image_width_height)


def _pad_and_crop_centre(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Crop the centre to the input size, with padding where the image is smaller."""
    size = preprocessing.input_size
    if min(image.size) < size:
        border = preprocessing.crop_mode == "border"
        fill = tuple(round(255 * value) if border else 0 for value in preprocessing.mean)
        padded = Image.new("RGB", (max(image.width, size), max(image.height, size)), fill)
        padded.paste(
            image.convert("RGB"), (max(0, size - image.width) // 2, max(0, size - image.height) // 2)
        )
        image = padded
    return _crop_centre(image, size, size)


def crop_image_views(
    image: Image.Image, preprocessing: Preprocessing, unit_square_crops: Crops
) -> npt.NDArray[np.uint8]:
    """Return augmented views of an image: crops of its centre square, resized to the input size.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode, as in :func:`resize_and_crop_image`.
    preprocessing : Preprocessing
        Its input size and resampling rule are used.
    unit_square_crops : Crops
        Boxes in the unit square.

    Returns
    -------
    ndarray of uint8, shape (views, input_size, input_size, 3)
    """
    image = render_image(image).image.convert("RGB")
    side, size = min(image.size), preprocessing.input_size
    square = _crop_centre(image, side, side)
    views = np.empty((len(unit_square_crops.flip), size, size, 3), dtype=np.uint8)
    for i, view in enumerate(views):
        left, top = side * unit_square_crops.left[i], side * unit_square_crops.top[i]
        right, bottom = left + side * unit_square_crops.width[i], top + side * unit_square_crops.height[i]
        box = (left, top, min(right, side), min(bottom, side))
        pixels = np.asarray(
            square.resize((size, size), _RESAMPLING_FILTERS[preprocessing.resampling], box=box)
        )
        view[:] = pixels[:, ::-1] if unit_square_crops.flip[i] else pixels
    return views


def _crop_centre(image: Image.Image, crop_width: int, crop_height: int) -> Image.Image:
    left, top = round((image.width - crop_width) / 2), round((image.height - crop_height) / 2)
    return image.crop((left, top, left + crop_width, top + crop_height))
