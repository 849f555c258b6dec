"""From an image to the 8-bit pixels that a backbone is fed with. No tensors: decoding must not load torch."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.card import Preprocessing
from sfm.backbones.crops import Crops
from sfm.backbones.rendering import render

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# A line of pixels, resized whole, would fill the memory with what the crop then throws away.
_LONGEST = 100


def preprocessing_of(config: Mapping[str, Any], image_size: int) -> Preprocessing:
    """Derive the preprocessing from timm's configuration of a set of weights.

    Parameters
    ----------
    config : mapping
        timm's pretrained configuration: ``crop_pct``, ``interpolation``, ``mean``, ``std``.
    image_size : int
        Side of the backbone's input, in pixels.

    Returns
    -------
    Preprocessing
        The crop keeps the share of the shorter side that the weights are evaluated with, rounded as in
        timm.
    """
    return Preprocessing(
        input_size=image_size,
        resize=math.floor(image_size / config["crop_pct"]),
        resampling=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize the shorter side of an image, keeping the aspect, and cut out the centre.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode; what is not opaque 8-bit pixels is rendered as such, by default: over white.
    preprocessing : Preprocessing

    Returns
    -------
    ndarray of uint8, shape (input_size, input_size, 3)
        Red, green, blue.
    """
    image = render(image).image
    shorter = min(image.size)
    if max(image.size) > _LONGEST * shorter:
        image = _centre(image, *(min(length, _LONGEST * shorter) for length in image.size))
    width, height = (preprocessing.resize * length // shorter for length in image.size)
    resized = image.resize((width, height), _FILTERS[preprocessing.resampling])
    return np.asarray(_centre(resized, preprocessing.input_size, preprocessing.input_size).convert("RGB"))


def look_through(image: Image.Image, preprocessing: Preprocessing, crops: Crops) -> npt.NDArray[np.uint8]:
    """Look at the centre square of an image through crops, as augmentation does.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode, as in :func:`crop`.
    preprocessing : Preprocessing
        Its input size and resampling rule are used.
    crops : Crops
        Boxes in the unit square.

    Returns
    -------
    ndarray of uint8, shape (views, input_size, input_size, 3)
    """
    image = render(image).image.convert("RGB")
    side, size = min(image.size), preprocessing.input_size
    square = _centre(image, side, side)
    views = np.empty((len(crops.flip), size, size, 3), dtype=np.uint8)
    for i, view in enumerate(views):
        left, top = side * crops.left[i], side * crops.top[i]
        right, bottom = left + side * crops.width[i], top + side * crops.height[i]
        box = (left, top, min(right, side), min(bottom, side))
        pixels = np.asarray(square.resize((size, size), _FILTERS[preprocessing.resampling], box=box))
        view[:] = pixels[:, ::-1] if crops.flip[i] else pixels
    return views


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
