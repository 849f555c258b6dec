"""``idx:PATH``, the file format of MNIST, gzip or not; and ``builtin:NAME``, datasets in this package."""

import gzip
import importlib.resources
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.file_tree import describe_dangling_link
from sfm.pipeline.sources.inventory import Inventory
from sfm.pipeline.sources.limits import MAX_IMAGE_BYTES, MAX_MEMBERS
from sfm.pipeline.sources.source import NO_SAMPLES, Source, Split, compute_digest, make_indexed_split
from sfm.stats_store.class_lists import iterate_class_list_lines, read_class_list_text
from sfm.stats_store.dataset_names import make_dataset_name_from_folder

IDX_READ_ERRORS = (OSError, EOFError, zlib.error)
"""Errors of reading and unpacking files."""

BUILTIN_FOLDERS = {"fashion-mnist-6k": ("fashion_mnist_6k", "MIT")}
"""Folder and licence of each dataset in this package."""


def open_idx_source(folder: str) -> Source:
    """Open a folder of idx files: ``train-images-idx3-ubyte`` and its three companions.

    A file ``classes.txt`` in the same folder has the names of the classes, one per line in label order; empty
    lines and lines that begin with ``#`` are ignored.

    Raises
    ------
    InputError
        If files are missing, damaged, or do not belong together.
    """
    root = expand_home(folder)
    if not root.is_dir():
        raise InputError(f"no dataset at idx:{folder}: {root} is not a folder")
    return open_idx_folder(
        root, dataset_name=make_dataset_name_from_folder(root), spec=f"idx:{folder}", licence="unknown"
    )


def open_builtin_source(dataset_name: str) -> Source:
    """Open a dataset that comes with this package.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if dataset_name not in BUILTIN_FOLDERS:
        raise InputError(
            f"no dataset builtin:{dataset_name}: there is "
            f"{', '.join(map('builtin:{}'.format, BUILTIN_FOLDERS))}"
        )
    folder, licence = BUILTIN_FOLDERS[dataset_name]
    root = Path(str(importlib.resources.files("sfm.pipeline"))) / "data" / folder
    return open_idx_folder(root, dataset_name=dataset_name, spec=f"builtin:{dataset_name}", licence=licence)


def open_idx_folder(root: Path, *, dataset_name: str, spec: str, licence: str) -> Source:
    """Open a folder of idx files: labels are read, images are read on request."""
    has_held_out = any(entry.name.startswith("t10k-") for entry in root.iterdir())
    labels = {
        split: read_idx_labels(find_idx_file(root, f"{split}-labels-idx1-ubyte"))
        for split in ("train", *(["t10k"] if has_held_out else []))
    }
    values = sorted({int(value) for split in labels.values() for value in np.unique(split)})
    width = len(str(max(values, default=0)))
    class_ids = [str(value).zfill(width) for value in values]
    name_file = root / "classes.txt"
    class_names = class_ids
    if name_file.exists():
        names = [
            line.display_name or line.class_name
            for line in iterate_class_list_lines(read_class_list_text(name_file))
        ]
        if len(names) <= max(values):
            raise InputError(f"{name_file} has {len(names)} names, but labels go up to {max(values)}")
        class_names = [names[value] for value in values]
    label_by_value = np.zeros(256, dtype=np.int32)
    label_by_value[values] = np.arange(len(values))
    shape = read_idx_image_height_and_width(find_idx_file(root, "train-images-idx3-ubyte"))

    def decode(data: bytes) -> Image.Image:
        return Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(shape))

    return Source(
        name=dataset_name,
        spec=spec,
        class_ids=class_ids,
        class_names=class_names,
        train=make_idx_split(
            find_idx_file(root, "train-images-idx3-ubyte"), label_by_value[labels["train"]], class_ids, shape
        ),
        test=make_idx_split(
            find_idx_file(root, "t10k-images-idx3-ubyte"), label_by_value[labels["t10k"]], class_ids, shape
        )
        if has_held_out
        else NO_SAMPLES,
        decode=decode,
        licence=licence,
        inventory=Inventory(
            no_held_out_reason="" if has_held_out else f"{root} holds no t10k-images-idx3-ubyte"
        ),
    )


def find_idx_file(root: Path, file_name: str) -> Path:
    """Return the file with a name, or with that name and ``.gz``."""
    for candidate in (root / file_name, root / f"{file_name}.gz"):
        if candidate.is_file():
            return candidate
        if candidate.is_symlink() and not candidate.exists():
            raise InputError(describe_dangling_link(candidate))
    raise InputError(f"{root} holds no {file_name} or {file_name}.gz")


def open_idx_file(path: Path) -> BinaryIO:
    """Open an idx file, unpacking it if its name ends in ``.gz``."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_idx_header_shape(path: Path, file: BinaryIO, expected_ndim: int) -> tuple[int, ...]:
    """Read the header of an idx file of unsigned bytes with `expected_ndim` axes, and return its shape."""
    try:
        header = file.read(4 + 4 * expected_ndim)
        magic, *shape = struct.unpack(f">{1 + expected_ndim}I", header)
    except (struct.error, *IDX_READ_ERRORS) as error:
        raise InputError(f"{path} is not an idx file: its header cannot be read") from error
    if magic != 0x0800 + expected_ndim:
        raise InputError(
            f"{path} is not an idx file of {expected_ndim}-dimensional bytes: it begins with "
            f"{header[:4].hex()}"
        )
    require_plausible_idx_header(path, tuple(shape), len(header))
    return tuple(shape)


def require_plausible_idx_header(path: Path, shape: tuple[int, ...], header_size_bytes: int) -> None:
    """Refuse a file whose header exceeds its size or the limits, before memory is allocated.

    Raises
    ------
    InputError
        If there are too many samples, images are empty or too large, or the file is truncated.
    """
    count, pixels = shape[0], math.prod(shape[1:])
    max_pixels = Image.MAX_IMAGE_PIXELS or MAX_IMAGE_BYTES
    if count > MAX_MEMBERS or pixels > max_pixels or pixels < 1:
        promise = " x ".join(map(str, shape))
        raise InputError(
            f"{path} promises {promise} bytes: at most {MAX_MEMBERS:,} images of {max_pixels:,} are read"
        )
    size = path.stat().st_size - header_size_bytes
    if path.suffix != ".gz" and size < count * pixels:
        raise InputError(f"{path} ends after {size:,} of the {count * pixels:,} bytes that it promises")


def read_idx_labels(path: Path) -> npt.NDArray[np.uint8]:
    """Return the labels in an idx file."""
    with open_idx_file(path) as file:
        (count,) = read_idx_header_shape(path, file, 1)
        try:
            data = file.read(count)
        except IDX_READ_ERRORS as error:
            raise InputError(f"{path} is damaged: {error}") from error
    if len(data) != count:
        raise InputError(f"{path} ends after {len(data)} of {count} labels")
    return np.frombuffer(data, dtype=np.uint8)


def read_idx_image_height_and_width(path: Path) -> tuple[int, int]:
    """Return height and width of the images in an idx file, in pixels."""
    with open_idx_file(path) as file:
        _, height, width = read_idx_header_shape(path, file, 3)
    return height, width


def make_idx_split(
    images_path: Path,
    labels: npt.NDArray[np.int32],
    class_ids: list[str],
    expected_height_and_width: tuple[int, int],
) -> Split:
    """Return the split of an idx file; images are read by seeking, so memory does not grow with the file."""
    file = open_idx_file(images_path)
    count, height, width = read_idx_header_shape(images_path, file, 3)
    if count != len(labels) or (height, width) != expected_height_and_width:
        raise InputError(
            f"{images_path} holds {count} images of {height}x{width}; "
            f"expected {len(labels)} of {expected_height_and_width[0]}x{expected_height_and_width[1]}"
        )
    size = expected_height_and_width[0] * expected_height_and_width[1]

    def read(i: int) -> bytes:
        try:
            file.seek(16 + i * size)
            data = file.read(size)
        except IDX_READ_ERRORS as error:
            raise InputError(f"{images_path} is damaged at image {i}: {error}") from error
        if len(data) != size:
            raise InputError(f"{images_path} ends before image {i} of {count}")
        return data

    status = images_path.stat()
    return make_indexed_split(
        labels=labels.astype(np.int32),
        class_ids=class_ids,
        read=read,
        location=lambda i: f"image {i} of {images_path}",
        listing_digest=compute_digest(
            str(images_path.resolve()), f"{status.st_size} {status.st_mtime_ns}", labels.tobytes()
        ),
    )
