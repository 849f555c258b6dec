"""From the bytes of an image file to an upright image, or to one clear reason why not."""

import functools
import io
import struct
import zlib

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""Formats of pixels only: others, such as PostScript, run programs on what they are given."""

DAMAGE = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
    RuntimeWarning,
    MemoryError,
    struct.error,
    zlib.error,
)
"""How Pillow's readers fail on damaged files; all of these mean the same here."""


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image file, upright: orientation tags are applied. The first frame, if it moves.

    Any mode: the way to red, green and blue belongs to a backbone's preprocessing.

    Raises
    ------
    ValueError
        If it is not a complete image of a known format, its pixels have no agreed range, or there are so many
        that it must be a mistake or an attack; these are refused before memory is taken for them.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
        require_bounded(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        require_range(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is not an image of a known format ({', '.join(FORMATS)})") from error
    except DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return image


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow reads, with their readers loaded."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def require_bounded(image: Image.Image) -> None:
    """Refuse an image whose header promises more pixels than Pillow deems safe, 89 million."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {most:,}: it could be a decompression bomb"
        )


def require_range(image: Image.Image) -> None:
    """Refuse pixels whose range is a matter of opinion: floats, and integers beyond 16 bits."""
    if image.mode == "F":
        raise ValueError("it has floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]
            raise ValueError(f"it has pixels from {low} to {high}: convert it to 8 or 16 bits")
