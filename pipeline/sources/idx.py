"""``idx:PATH``, the file format of MNIST, gzip or not; and the datasets that come with this package."""

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
from sfm.pipeline.sources.inventory import Inventory
from sfm.pipeline.sources.limits import IMAGE_BYTES, MEMBERS
from sfm.pipeline.sources.source import NO_SAMPLES, Source, Split, digest_of, indexed_split
from sfm.pipeline.sources.walk import dangling_link
from sfm.stats_store.class_lists import iterate_class_lines, read_class_list_text
from sfm.stats_store.dataset_names import make_name_from_folder

DAMAGE = (OSError, EOFError, zlib.error)
"""How a disk and gzip fail."""

BUILTIN = {"fashion-mnist-6k": ("fashion_mnist_6k", "MIT")}


def idx_source(text: str) -> Source:
    """Open a folder of idx files: ``train-images-idx3-ubyte`` and its three companions.

    A file ``classes.txt`` beside them, one name per line in label order, gives the classes their names; empty
    lines and those that begin with ``#`` do not count.

    Raises
    ------
    InputError
        If files are missing, damaged, or do not belong together.
    """
    root = expand_home(text)
    if not root.is_dir():
        raise InputError(f"no dataset at idx:{text}: {root} is not a folder")
    return read_idx(root, name=make_name_from_folder(root), spec=f"idx:{text}", licence="unknown")


def builtin_source(text: str) -> Source:
    """Open a dataset that comes with this package.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if text not in BUILTIN:
        raise InputError(
            f"no dataset builtin:{text}: there is {', '.join('builtin:' + name for name in BUILTIN)}"
        )
    folder, licence = BUILTIN[text]
    root = Path(str(importlib.resources.files("sfm.pipeline"))) / "data" / folder
    return read_idx(root, name=text, spec=f"builtin:{text}", licence=licence)


def read_idx(root: Path, *, name: str, spec: str, licence: str) -> Source:
    """Read the labels and locate the images of both splits."""
    held_out = any(entry.name.startswith("t10k-") for entry in root.iterdir())
    labels = {
        split: read_labels(find(root, f"{split}-labels-idx1-ubyte"))
        for split in ("train", *(["t10k"] if held_out else []))
    }
    values = sorted({int(value) for split in labels.values() for value in np.unique(split)})
    width = len(str(max(values, default=0)))
    class_ids = [str(value).zfill(width) for value in values]
    names = root / "classes.txt"
    class_names = class_ids
    if names.exists():
        listed = [shown or name for _, name, shown in iterate_class_lines(read_class_list_text(names))]
        if len(listed) <= max(values):
            raise InputError(f"{names} has {len(listed)} names, but labels go up to {max(values)}")
        class_names = [listed[value] for value in values]
    index = np.zeros(256, dtype=np.int32)
    index[values] = np.arange(len(values))
    shape = image_shape(find(root, "train-images-idx3-ubyte"))

    def decode(data: bytes) -> Image.Image:
        return Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(shape))

    return Source(
        name=name,
        spec=spec,
        class_ids=class_ids,
        class_names=class_names,
        train=idx_split(find(root, "train-images-idx3-ubyte"), index[labels["train"]], class_ids, shape),
        test=idx_split(find(root, "t10k-images-idx3-ubyte"), index[labels["t10k"]], class_ids, shape)
        if held_out
        else NO_SAMPLES,
        decode=decode,
        licence=licence,
        inventory=Inventory(no_held_out="" if held_out else f"{root} holds no t10k-images-idx3-ubyte"),
    )


def find(root: Path, stem: str) -> Path:
    """Return the file of that name, gzip or not."""
    for candidate in (root / stem, root / f"{stem}.gz"):
        if candidate.is_file():
            return candidate
        if candidate.is_symlink() and not candidate.exists():
            raise InputError(dangling_link(candidate))
    raise InputError(f"{root} holds no {stem} or {stem}.gz")


def open_idx(path: Path) -> BinaryIO:
    """Open an idx file for reading, unpacking it on the way if need be."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_header(path: Path, file: BinaryIO, axes: int) -> tuple[int, ...]:
    """Read an idx header of unsigned bytes with so many axes and return the shape."""
    try:
        header = file.read(4 + 4 * axes)
        magic, *shape = struct.unpack(f">{1 + axes}I", header)
    except (struct.error, *DAMAGE) as error:
        raise InputError(f"{path} is not an idx file: its header cannot be read") from error
    if magic != 0x0800 + axes:
        raise InputError(
            f"{path} is not an idx file of {axes}-dimensional bytes: it begins with {header[:4].hex()}"
        )
    require_readable(path, tuple(shape), len(header))
    return tuple(shape)


def require_readable(path: Path, shape: tuple[int, ...], header: int) -> None:
    """Refuse a file whose header promises more than it may hold, before memory is taken for it.

    Raises
    ------
    InputError
        If there are too many samples, images are empty or too large, or the file is shorter than it says.
    """
    count, pixels, most = shape[0], math.prod(shape[1:]), Image.MAX_IMAGE_PIXELS or IMAGE_BYTES
    if count > MEMBERS or pixels > most or pixels < 1:
        size = " x ".join(map(str, shape))
        raise InputError(f"{path} promises {size} bytes: at most {MEMBERS:,} images of {most:,} are read")
    held = path.stat().st_size - header
    if path.suffix != ".gz" and held < count * pixels:
        raise InputError(f"{path} ends after {held:,} of the {count * pixels:,} bytes that it promises")


def read_labels(path: Path) -> npt.NDArray[np.uint8]:
    """Read a file of labels."""
    with open_idx(path) as file:
        (count,) = read_header(path, file, 1)
        try:
            data = file.read(count)
        except DAMAGE as error:
            raise InputError(f"{path} is damaged: {error}") from error
    if len(data) != count:
        raise InputError(f"{path} ends after {len(data)} of {count} labels")
    return np.frombuffer(data, dtype=np.uint8)


def image_shape(path: Path) -> tuple[int, int]:
    """Return height and width of the images of a file, in pixels."""
    with open_idx(path) as file:
        _, height, width = read_header(path, file, 3)
    return height, width


def idx_split(
    path: Path, labels: npt.NDArray[np.int32], class_ids: list[str], shape: tuple[int, int]
) -> Split:
    """Describe a split; images are read by seeking, so memory does not grow with the file."""
    file = open_idx(path)
    count, *found = read_header(path, file, 3)
    if count != len(labels) or tuple(found) != shape:
        raise InputError(
            f"{path} holds {count} images of {found[0]}x{found[1]}; "
            f"expected {len(labels)} of {shape[0]}x{shape[1]}"
        )
    size = shape[0] * shape[1]

    def read(i: int) -> bytes:
        try:
            file.seek(16 + i * size)
            data = file.read(size)
        except DAMAGE as error:
            raise InputError(f"{path} is damaged at image {i}: {error}") from error
        if len(data) != size:
            raise InputError(f"{path} ends before image {i} of {count}")
        return data

    status = path.stat()
    return indexed_split(
        labels=labels.astype(np.int32),
        class_ids=class_ids,
        read=read,
        where=lambda i: f"image {i} of {path}",
        listing=digest_of(str(path.resolve()), f"{status.st_size} {status.st_mtime_ns}", labels.tobytes()),
    )
