"""Open untrusted image files; the only module that calls ``PIL.Image.open``."""

import functools
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from sfm.errors import InputError
from sfm.untrusted_files import read_bounded_file

PILLOW_ERRORS = (
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
"""Exceptions that Pillow raises on damaged files."""

MAX_PIXEL_BYTES = 8
"""Bytes of the largest PNG pixel: four channels of 16 bits."""

MAX_METADATA_BYTES = 16 * 2**20
"""Bytes of a PNG file besides its pixels: texts and profiles that editors add, other frames."""


def open_image(
    data: bytes,
    pillow_formats: tuple[str, ...],
    max_pixel_count: int,
    required_width_and_height: tuple[int, int] | None = None,
) -> Image.Image:
    """Open an image file if it has one of the given formats; nothing is decoded yet.

    Without a list of formats Pillow tries all it knows, among them PostScript, for which it runs a program.

    Parameters
    ----------
    data : bytes
        The whole file.
    pillow_formats : tuple of str
        Pillow's names of formats. The first bytes of a file tell its format, not its name.
    max_pixel_count : int
        Larger images are refused: an image of many pixels may be a small file.
    required_width_and_height : (int, int), optional
        Width and height that the image must have.

    Raises
    ------
    ValueError
        If the header declares more pixels, or another width or height.
    Exception
        One of ``PILLOW_ERRORS``, if it is not an image of these formats.
    """
    silence_pillow_warnings()
    image: Image.Image = Image.open(io.BytesIO(data), formats=pillow_formats)  # noqa: TID251
    if required_width_and_height and image.size != required_width_and_height:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, "
            f"{required_width_and_height[0]} x {required_width_and_height[1]} are expected"
        )
    if image.width * image.height > max_pixel_count:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {max_pixel_count:,}: it could be a "
            "decompression bomb"
        )
    return image


@functools.cache
def silence_pillow_warnings() -> None:
    """Silence Pillow's warnings about large images, which are refused here, and about unreadable metadata."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def read_png_as_rgb(
    path: Path, max_pixel_count: int, required_width_and_height: tuple[int, int] | None = None
) -> npt.NDArray[np.uint8]:
    """Read a PNG file as an RGB array of shape (height, width, 3), converted from any mode.

    Torchvision's ImageFolder reads it so too. Of an animation the first frame is read.

    Parameters
    ----------
    path : Path
    max_pixel_count : int
        Larger images are refused before memory is taken for them.
    required_width_and_height : (int, int), optional
        Width and height that the image must have.

    Raises
    ------
    InputError
        If it is not a PNG file, damaged, too large or of another size.
    """
    try:
        data = read_bounded_file(path, MAX_PIXEL_BYTES * max_pixel_count + MAX_METADATA_BYTES)
        return np.asarray(
            open_image(data, ("PNG",), max_pixel_count, required_width_and_height).convert("RGB")
        )
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read the image {path}: it is not a PNG file") from error
    except OSError as error:
        raise InputError(f"cannot read the image {path}: {error.strerror or error}") from error
    except PILLOW_ERRORS as error:
        raise InputError(f"cannot read the image {path}: {error or type(error).__name__}") from error
