"""From the bytes of an image file to an upright image, or to one clear reason why not."""

import functools
import sys
import warnings
from contextlib import suppress

from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from sfm.backbones.rendering import DECLARED_WHITE_KEY, DEEP_COLOUR_KEY
from sfm.image_files import PILLOW_ERRORS, open_image

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""Formats of pixels only: others, such as PostScript, run programs on what they are given."""

MAX_PNG_TEXT_BYTES = 16 << 20
"""Bytes of a PNG file's colour profile, or of one of its texts, once unpacked; more may be an attack."""


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image file, upright: orientation tags are applied. The first frame, if it moves.

    Any mode, with its transparency: `sfm.backbones.rendering` makes opaque 8-bit pixels of it. Metadata that
    cannot be read are passed over: the pixels count.

    Raises
    ------
    ValueError
        If it is not a complete image of a known format, or there are so many pixels that it must be a mistake
        or an attack; these are refused before memory is taken for them.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        most = Image.MAX_IMAGE_PIXELS or sys.maxsize
        image = open_image(data, load_formats(), most)
        layout = get_raw_mode(image)
        image.load()
        record_bit_depth(image, layout)
        with suppress(*PILLOW_ERRORS):
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is not an image of a known format ({', '.join(FORMATS)})") from error
    except PILLOW_ERRORS as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return image


@functools.cache
def load_formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow reads, with their readers loaded and set up.

    Pillow warns of metadata that it cannot read, for every such image and without its name; and it refuses
    PNG files with a colour profile or a text of more than 1 MiB.
    """
    Image.init()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_PNG_TEXT_BYTES)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def get_raw_mode(image: Image.Image) -> str:
    """Return how Pillow is about to read the pixels of an image, such as ``RGB;16B``; empty if unknown."""
    arguments = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def record_bit_depth(image: Image.Image, layout: str) -> None:
    """Note what the modes of Pillow do not tell: 12 bits of 16, and colours that had 16 bits.

    Where PNG gives the transparent value at the depth of the file, it is made that of the pixels.
    """
    if layout == "I;12":
        image.info[DECLARED_WHITE_KEY] = 4095
    if ";16" in layout and not image.mode.startswith("I"):
        image.info[DEEP_COLOUR_KEY] = True
    clear = image.info.get("transparency")
    if image.format == "PNG" and layout in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // (2 ** int(layout[2:]) - 1)
    if image.format == "PNG" and layout == "RGB;16B" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
