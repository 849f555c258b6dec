"""Decode the bytes of an image file into an upright Pillow image."""

import functools
import sys
import warnings
from contextlib import suppress

from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from sfm.backbones.rendering import DECLARED_WHITE_KEY, DEEP_COLOUR_KEY
from sfm.image_files import PILLOW_ERRORS, open_image

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""Formats of plain pixels: for others, such as PostScript, Pillow runs external programs."""

MAX_PNG_TEXT_BYTES = 16 << 20
"""Maximum unpacked size of a colour profile or text in a PNG file; more may be an attack."""


def decode_image(data: bytes) -> Image.Image:
    """Return the image of a whole image file, upright: orientation tags are applied.

    The image may have any mode and transparency; `sfm.backbones.rendering` makes opaque 8-bit pixels of it.
    Of an animation the first frame is decoded. Metadata that cannot be read are ignored.

    Raises
    ------
    ValueError
        If it is not a complete image of a known format, or has too many pixels, which is checked before
        memory is allocated.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        max_pixels = Image.MAX_IMAGE_PIXELS or sys.maxsize
        image = open_image(data, configure_pillow_and_list_formats(), max_pixels)
        raw_mode = get_pillow_raw_mode(image)
        image.load()
        record_depth_and_rescale_transparency(image, raw_mode)
        with suppress(*PILLOW_ERRORS):
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is not an image of a known format ({', '.join(FORMATS)})") from error
    except PILLOW_ERRORS as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return image


@functools.cache
def configure_pillow_and_list_formats() -> tuple[str, ...]:
    """Load the readers of this build of Pillow, once, and return which of ``FORMATS`` it reads.

    Also silences Pillow's warnings about metadata, which do not name the image, and raises its limit of
    1 MiB for colour profiles and texts of PNG files.
    """
    Image.init()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_PNG_TEXT_BYTES)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def get_pillow_raw_mode(image: Image.Image) -> str:
    """Return Pillow's raw mode of an image that is not loaded yet, such as ``RGB;16B``; "" if unknown."""
    arguments = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def record_depth_and_rescale_transparency(image: Image.Image, pillow_raw_mode: str) -> None:
    """Record in ``image.info`` bit depths that Pillow's modes do not represent: 12 bits, and 16-bit colours.

    A transparent value in the depth of the PNG file is scaled to the depth of the pixels.
    """
    if pillow_raw_mode == "I;12":
        image.info[DECLARED_WHITE_KEY] = 4095
    if ";16" in pillow_raw_mode and not image.mode.startswith("I"):
        image.info[DEEP_COLOUR_KEY] = True
    transparent = image.info.get("transparency")
    if image.format == "PNG" and pillow_raw_mode in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2 ** int(pillow_raw_mode[2:]) - 1)
    if image.format == "PNG" and pillow_raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
