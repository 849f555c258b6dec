"""Render images of any mode as opaque 8-bit pixels: composite transparency, scale deep values."""

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

DEEP_COLOUR_KEY, DECLARED_WHITE_KEY = "sfm deep colour", "sfm declared white"
"""Keys of ``Image.info`` that decoders set, because Pillow's modes lack this information.

The former is True if colours had 16 bits; the latter is the greatest value that the depth allows."""

MAX_DARK_SHARE = 1 / 16
"""An integer image whose brightest value is below this share of its range is nearly black once scaled."""

COLOUR_NAMES = {(255, 255, 255): "white", (0, 0, 0): "black"}


@dataclass(frozen=True)
class Rendering:
    """How images become opaque 8-bit pixels.

    Attributes
    ----------
    background : str
        Colour behind transparent pixels: ``"white"``, ``"black"`` or ``"#rrggbb"``.
    white : float or None
        The value that is white in integer images of more than 8 bits and in floating-point ones; None: the
        greatest value of 16 bits, and floating-point images are refused.
    """

    background: str = "white"
    white: float | None = None


@dataclass(frozen=True)
class RenderedImage:
    """An image as opaque 8-bit pixels.

    Attributes
    ----------
    image : PIL.Image.Image
        Grey (``L``) or ``RGB``, without transparency.
    composited : bool
        Whether a pixel was not opaque, so that the background shows.
    dark : bool
        Whether it has more than 8 bits and its brightest value is below `MAX_DARK_SHARE` of their range,
        without a declared white value.
    """

    image: Image.Image
    composited: bool = False
    dark: bool = False


DEFAULT_RENDERING = Rendering()


def parse_background_colour(text: str) -> str:
    """Return a background colour in canonical form: a name or ``#rrggbb``.

    Raises
    ------
    ValueError
        If it is not a valid colour.
    """
    if text in COLOUR_NAMES.values():
        return text
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ValueError(
            f"background={text} is no colour: write background=white, black or #rrggbb, as in #ff8800"
        )
    colour = ImageColor.getrgb(text)
    return COLOUR_NAMES.get((colour[0], colour[1], colour[2]), text.lower())


def parse_white_value(text: str) -> float:
    """Return the value that is white; a whole number is an int, so that 4095 and 4095.0 are the same.

    Raises
    ------
    ValueError
        If it is not a positive number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"white={text} is no brightness: write the value that is white, as in white=4095")
    return int(value) if value.is_integer() else value


def render_image(image: Image.Image, rendering: Rendering = DEFAULT_RENDERING) -> RenderedImage:
    """Return an image as opaque 8-bit pixels.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode.
    rendering : Rendering

    Raises
    ------
    ValueError
        If the range of its values is unknown, or values exceed the white value.
    """
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    alpha = get_alpha_unless_opaque(image)
    opaque = convert_to_8bit_without_alpha(image, rendering.white)
    if alpha is None:
        return opaque
    background = Image.new("RGB", image.size, ImageColor.getrgb(rendering.background))
    background.paste(opaque.image.convert("RGB"), mask=alpha)
    return RenderedImage(background, composited=True, dark=opaque.dark)


def get_alpha_unless_opaque(image: Image.Image) -> Image.Image | None:
    """Return the opacity of each pixel, as an image of mode ``L``; None if all are opaque."""
    if image.mode in ("RGBA", "LA", "PA"):
        alpha = image.getchannel("A")
    elif "transparency" not in image.info:
        return None
    elif image.mode.startswith("I;16"):
        hidden = np.asarray(image) == image.info["transparency"]
        alpha = Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))
    elif image.mode in ("1", "L", "P", "RGB"):
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return None
    return None if alpha.getextrema()[0] == 255 else alpha


def convert_to_8bit_without_alpha(image: Image.Image, white_value: float | None) -> RenderedImage:
    """Return the colours of an image as opaque 8-bit pixels; transparency is dropped, not composited."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return scale_grey_to_8bit(image, white_value)
    if image.mode == "L" and "transparency" not in image.info:
        # Grey images are resized as grey: a third of the work, and the same pixels.
        return RenderedImage(image)
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about palettes with several transparent colours; this conversion avoids it.
        image = image.convert("RGBA")
    colours = image if image.mode == "RGB" and "transparency" not in image.info else image.convert("RGB")
    if image.info.get(DEEP_COLOUR_KEY) is not True:
        return RenderedImage(colours)
    if white_value is not None:
        raise ValueError(
            f"its colours have 16 bits each, which white={white_value} cannot scale: convert it to 8 bits"
        )
    return RenderedImage(colours, dark=bool(np.asarray(colours).max() < 256 * MAX_DARK_SHARE))


def scale_grey_to_8bit(image: Image.Image, white_value: float | None) -> RenderedImage:
    """Scale a grey image of more than 8 bits to 8.

    Pillow's own conversion clips at 255 instead.
    """
    values: npt.NDArray[np.generic] = np.asarray(image)
    declared = image.info.get(DECLARED_WHITE_KEY)
    if white_value is not None:
        most = white_value
    elif image.mode == "F":
        raise ValueError(
            "it has floating-point pixels of unknown range: say which value is white, as in "
            "DATASET?white=1.0, or convert it to 8 or 16 bits"
        )
    else:
        most = declared if isinstance(declared, int) else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # nor if they are not numbers
        limit = f"beyond 0 to white={white_value}: " if white_value is not None else ""
        raise ValueError(
            f"it has pixels from {low} to {high}, {limit}say which value is white, as in DATASET?white=4095, "
            f"or convert it to 8 or 16 bits"
        )
    grey = np.clip(np.rint(values.astype(np.float32) / np.float32(most / 255)), 0, 255)
    unknown = white_value is None and not isinstance(declared, int)
    is_dark = unknown and bool(high < 65536 * MAX_DARK_SHARE)
    return RenderedImage(Image.fromarray(grey.astype(np.uint8)), dark=is_dark)
