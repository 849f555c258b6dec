"""Read the images of another program, with their labels, and resize them to a canvas.

A folder of class folders, tar shards and tables are read as datasets are; files of arrays in
:mod:`sfm.pipeline.foreign_arrays`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.rendering import render_image
from sfm.config_fields import MAX_IMAGES_PER_CLASS
from sfm.errors import InputError
from sfm.foreign_images import ForeignImages
from sfm.pipeline.foreign_arrays import ARRAY_SUFFIXES, iterate_pillow_images, read_labelled_arrays
from sfm.pipeline.sources.folder import open_folder_source
from sfm.pipeline.sources.folder_layout import list_class_folder_names
from sfm.pipeline.sources.parquet import open_parquet_source
from sfm.pipeline.sources.source import Source
from sfm.pipeline.sources.wds import TAR_SUFFIXES, open_wds_source

PARQUET_SUFFIX = ".parquet"

MAX_UNCHECKED_BYTES, MAX_GROWTH = 2**30, 250
"""Bytes of resized images that are kept in any case, and the highest ratio to bytes of files above that."""

LabelledImage = tuple[Image.Image, str]
"""An RGB image and its class as it is written where it was read."""


def read_foreign_images(path: Path, canvas_pixels: int) -> ForeignImages:
    """Read labelled images that another program made, and resize them to square canvases.

    Parameters
    ----------
    path : Path
        A folder with one folder of images per class; a ``.npz``, ``.pt``, ``.pth`` or ``.safetensors`` file
        of images and labels; a WebDataset tar or a parquet table, or a folder of them.
    canvas_pixels : int
        Side of the canvas. Of an image that is not square, the central square is resized (bicubic).

    Raises
    ------
    InputError
        If it is none of these, cannot be read, or holds images without labels.
    """
    notes: list[str] = []
    if path.name.lower().endswith(ARRAY_SUFFIXES):
        images = iterate_pillow_images(read_labelled_arrays(path))
    else:
        source = find_image_folder_opener(path)(str(path))
        images = iterate_source_images(source)
        if source.test.shards:
            notes.append(f"Only the training images in {path} were read: it has held-out images too.")
        notes += source.inventory.notes
    return resize_to_canvas(images, canvas_pixels, path, notes)


def find_image_folder_opener(path: Path) -> Callable[[str], Source]:
    """Return the function that opens the images at a path as the training split of a dataset.

    Raises
    ------
    InputError
        If it holds neither class folders nor shards nor tables.
    """
    if not path.exists():
        raise InputError(f"no images at {path}")
    if not path.is_dir():
        if path.name.endswith(TAR_SUFFIXES):
            return open_wds_source
        if path.suffix == PARQUET_SUFFIX:
            return open_parquet_source
        raise InputError(
            f"{path} is no run directory and no file of images: {', '.join(ARRAY_SUFFIXES)}, .tar and "
            f"{PARQUET_SUFFIX} files are read"
        )
    if any(any(path.glob(f"*{suffix}")) for suffix in TAR_SUFFIXES):
        return open_wds_source
    if any(any(path.glob(f"{folder}*{PARQUET_SUFFIX}")) for folder in ("", "data/")):
        return open_parquet_source
    if list_class_folder_names(path):
        return open_folder_source
    raise InputError(
        f"{path} is no run directory of `sfm distill`, and holds no class folders, shards or tables of images"
    )


def iterate_source_images(source: Source) -> Iterator[LabelledImage]:
    """Yield the images of a source's training split with their class ids.

    Raises
    ------
    InputError
        If one cannot be read or decoded; names it.
    """
    for shard in source.train.shards:
        for sample_or_file in shard.read(None):
            sample = sample_or_file.read()
            try:
                if sample.fault:
                    raise ValueError(sample.fault)
                image = render_image(source.decode(sample.data), source.rendering).image
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read the image {sample.location}: {error}") from error
            yield image.convert("RGB"), sample.class_id


def resize_to_canvas(
    images: Iterable[LabelledImage], canvas_pixels: int, path: Path, notes: list[str]
) -> ForeignImages:
    """Resize labelled images to square canvases, one after the other.

    Raises
    ------
    InputError
        If there are none, too many of a class, or resized they take far more memory than their files.
    """
    file_bytes = sum_file_bytes(path)
    sha, sizes, counts = hashlib.sha256(), Counter[tuple[int, int]](), Counter[str]()
    canvases: list[npt.NDArray[np.uint8]] = []
    labels: list[str] = []
    for image, label in images:
        sha.update(json.dumps([image.width, image.height, label]).encode())
        sha.update(image.tobytes())
        sizes[image.size] += 1
        counts[label] += 1
        canvases.append(resize_central_square(image, canvas_pixels))
        labels.append(label)
        held_bytes = len(canvases) * canvases[-1].nbytes
        if counts[label] > MAX_IMAGES_PER_CLASS or held_bytes > max(
            MAX_UNCHECKED_BYTES, MAX_GROWTH * file_bytes
        ):
            raise InputError(
                f"{path} holds more images than are read: at most {MAX_IMAGES_PER_CLASS:,} per class, and "
                f"{MAX_UNCHECKED_BYTES // canvases[-1].nbytes:,} of them at {canvas_pixels} px unless their "
                f"files are larger"
            )
    if not canvases:
        raise InputError(f"{path} holds no image")
    return ForeignImages(
        np.stack(canvases), labels, sha.hexdigest(), [*notes, *describe_resizing(sizes, canvas_pixels)]
    )


def sum_file_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder and below it."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def resize_central_square(image: Image.Image, canvas_pixels: int) -> npt.NDArray[np.uint8]:
    """Return the central square of an RGB image, resized (bicubic), shape (canvas, canvas, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.crop(box).resize((canvas_pixels, canvas_pixels), Image.Resampling.BICUBIC))


def describe_resizing(image_sizes: Counter[tuple[int, int]], canvas_pixels: int) -> list[str]:
    """Return a sentence about how images of some sizes became canvases; none if nothing was done."""
    if set(image_sizes) == {(canvas_pixels, canvas_pixels)}:
        return []
    widths, heights = zip(*image_sizes, strict=True)
    smallest, largest = (f"{f(widths)} x {f(heights)}" for f in (min, max))
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    what = "they were" if all(w == h for w, h in image_sizes) else "the central square of each was"
    return [
        f"The images are of {sizes} pixels: {what} resized to {canvas_pixels} x {canvas_pixels} (bicubic)."
    ]
