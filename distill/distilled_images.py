"""Distilled images as 8-bit files, which evaluation reads."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sfm.distill.pyramid import decode_pyramid
from sfm.image_files import read_png_as_rgb
from sfm.stats_store.digests import compute_chunked_array_digest

DECODE_BATCH = 64


def iterate_decoded_pixels(
    levels: Sequence[Tensor], canvas_pixels: int, color_decorrelation: bool = True
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the images of pyramids one by one as 8-bit arrays of shape (canvas, canvas, 3).

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
    canvas_pixels : int
        Side of the images, in pixels.
    color_decorrelation : bool
        See :func:`decode_pyramid`.
    """
    for start in range(0, len(levels[0]), DECODE_BATCH):
        with torch.no_grad():
            batch = [level[start : start + DECODE_BATCH] for level in levels]
            images = decode_pyramid(batch, canvas_pixels, color_decorrelation)
        yield from (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def compute_images_digest(
    levels: Sequence[Tensor], canvas_pixels: int, color_decorrelation: bool = True
) -> str:
    """Return the digest of the images' pixels, to detect later edits."""
    images = iterate_decoded_pixels(levels, canvas_pixels, color_decorrelation)
    blocks = (image[None] for image in images)
    return compute_chunked_array_digest(
        blocks, np.dtype(np.uint8), (len(levels[0]), canvas_pixels, canvas_pixels, 3)
    )


def make_slug(name: str) -> str:
    """Reduce a name to ASCII letters, digits and dashes, at most 48: "T-shirt/top" -> "t-shirt-top"."""
    plain = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:48].rstrip("-")


def make_class_folder_names(class_ids: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Name a folder per class such that sorting the names keeps the order of the classes.

    Falls back to the class id, then to the index, if a name has no ASCII letter or digit.
    """
    width = len(str(len(class_ids) - 1))
    words = [make_slug(name) or make_slug(id_) for id_, name in zip(class_ids, class_names, strict=True)]
    return [f"{index:0{width}d}_{word}".rstrip("_") for index, word in enumerate(words)]


def write_images(
    folder: Path, images: Iterator[npt.NDArray[np.uint8]], class_folder_names: Sequence[str], ipc: int
) -> None:
    """Write images as ``folder/<class>/<i>.png``, 8-bit RGB.

    Parameters
    ----------
    folder : Path
        Parent of the classes' folders.
    images : iterator of ndarray of uint8, shape (side, side, 3)
        The `ipc` images of the first class, then those of the second, ...
    class_folder_names : sequence of str
        Names of the classes' folders.
    ipc : int
        Images per class.
    """
    for name in class_folder_names:
        (folder / name).mkdir()
        for file_name in make_image_file_names(ipc):
            Image.fromarray(next(images)).save(folder / name / file_name)


def make_image_file_names(ipc: int) -> list[str]:
    """Return the names of the files of one class, such that sorting keeps their order."""
    width = len(str(ipc - 1))
    return [f"{index:0{width}d}.png" for index in range(ipc)]


def read_written_images(files: Sequence[Path], canvas_pixels: int) -> npt.NDArray[np.uint8]:
    """Read images that :func:`write_images` wrote, shape (image, canvas, canvas, 3).

    Raises
    ------
    InputError
        If one is missing, damaged or of another size.
    """
    size = canvas_pixels, canvas_pixels
    return np.stack([read_png_as_rgb(file, canvas_pixels**2, size) for file in files])
