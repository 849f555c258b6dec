"""Read labelled images from a file of arrays: ``.npz``, or tensors of `torch.save` or safetensors."""

import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.constrained_types import MAX_CLASSES
from sfm.errors import InputError
from sfm.pipeline.sources.limits import require_short_class_name
from sfm.text import format_names, sanitize_line
from sfm.untrusted_files import open_regular_file

TORCH_SUFFIXES = (".pt", ".pth", ".safetensors")
ARRAY_SUFFIXES = (".npz", *TORCH_SUFFIXES)

IMAGE_KEYS = ("images", "image", "data", "x")
LABEL_KEYS = ("labels", "label", "targets", "y")
CLASS_KEYS = ("class_ids", "classes", "class_names")
"""Names of the arrays that are read, in any case of letters; the first that is there counts."""

MAX_UNCHECKED_BYTES, MAX_COMPRESSION = 2**28, 50
"""Bytes of an array of a compressed file that are read in any case, and the highest compression above."""

ROUNDING = 1e-3
"""How far values in 0 to 1 may lie outside by rounding; they are clipped."""

BYTE_RANGE_START = 2.0
"""Floating-point images with a larger maximum are in 0 to 255."""

NamedArrays = Mapping[str, Any]
"""Arrays, or lists of text, by name."""


class LabelledArrays(NamedTuple):
    """The images and labels of a file.

    Attributes
    ----------
    images : ndarray of uint8, shape (image, y, x, channel)
        One or three channels.
    class_labels : list of str
        The class of every image: a number, or its name if the file names classes.
    """

    images: npt.NDArray[np.uint8]
    class_labels: list[str]


def read_labelled_arrays(path: Path) -> LabelledArrays:
    """Read the images and labels of a file of arrays; no code of the file is run.

    Parameters
    ----------
    path : Path
        A ``.npz``, ``.pt``, ``.pth`` or ``.safetensors`` file that holds images as
        (image, channel, y, x), (image, y, x, channel) or (image, y, x), of 8 bits, or as numbers in 0 to 1
        or 0 to 255; and one label per image: a number from 0, or, with a list of classes beside them, its
        position there. A pair (images, labels) needs no names.

    Raises
    ------
    InputError
        If it cannot be read, holds pickled objects, lacks images or labels, or they do not fit together.
    """
    arrays = read_npz_arrays(path) if path.suffix.lower() == ".npz" else read_torch_arrays(path)
    images, labels = find_array(arrays, IMAGE_KEYS), find_array(arrays, LABEL_KEYS)
    held = format_names([sanitize_line(name, 40) for name in arrays]) or "nothing"
    if images is None:
        raise InputError(f"{path} holds no images: expected an array `images`, found {held}")
    if labels is None:
        raise InputError(f"{path} holds images without labels: expected an array `labels`, found {held}")
    class_labels = make_class_labels(labels, find_array(arrays, CLASS_KEYS), path)
    pixels = make_pixels(np.asarray(images), path)
    if len(class_labels) != len(pixels):
        raise InputError(f"{path} holds {len(pixels):,} images, but {len(class_labels):,} labels")
    return LabelledArrays(pixels, class_labels)


def find_array(arrays: NamedArrays, names: Sequence[str]) -> Any:
    """Return the first of the arrays of these names, in any case of letters; None if there is none."""
    by_name = {name.lower(): array for name, array in arrays.items()}
    return next((by_name[name] for name in names if name in by_name), None)


def read_npz_arrays(path: Path) -> NamedArrays:
    """Read the arrays of a ``.npz`` file that are images, labels or classes; the others are None.

    Raises
    ------
    InputError
        If it is damaged, holds pickled objects among them, or unpacks to much more than its size.
    """
    try:
        with open_regular_file(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {*IMAGE_KEYS, *LABEL_KEYS, *CLASS_KEYS}
            return {
                name: read_npz_member(archive, info, path) if name.lower() in wanted else None
                for name, info in members.items()
            }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read images from {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} is not a .npz file of arrays: {sanitize_line(str(error), 200)}") from error


def read_npz_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> npt.NDArray[Any]:
    """Read one array of a ``.npz`` file.

    Raises
    ------
    InputError
        If it holds pickled objects, or takes more memory than its part of the file explains.
    ValueError
        If it is damaged.
    """
    with archive.open(info) as member:
        shape, dtype = read_npy_header(member)
    name = sanitize_line(info.filename, 40)
    if dtype.hasobject:
        raise InputError(
            f"{path} holds pickled objects as {name}, which may run any code: save plain arrays of numbers"
        )
    size = math.prod(shape) * dtype.itemsize
    if size > info.file_size or size > max(MAX_UNCHECKED_BYTES, MAX_COMPRESSION * info.compress_size):
        raise InputError(
            f"{path} declares {size:,} bytes for {name}, which has {info.compress_size:,} in the file: "
            f"images do not compress like that"
        )
    with archive.open(info) as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and type of an array from the header of its file; ValueError if it has none."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version[0]}.{version[1]} of the format is not read")
    return shape, dtype


def read_torch_arrays(path: Path) -> NamedArrays:
    """Read the tensors of a file as arrays, and its lists of text.

    Raises
    ------
    InputError
        If it holds pickled objects, or is neither tensors by name nor a pair of images and labels.
    """
    import torch

    from sfm.backbones.weight_files import TensorFilePurpose, is_plain_tensor, load_tensors_safely

    purpose = TensorFilePurpose(
        "images",
        "a file of plain tensors",
        "save only its tensors: torch.save({'images': images, 'labels': labels}, NEW)",
    )
    content = load_tensors_safely(path, purpose)
    if isinstance(content, list | tuple) and len(content) == 2:
        content = {"images": content[0], "labels": content[1]}
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__}: expected tensors `images` and `labels` in a dict, or "
            f"as a pair"
        )
    arrays: dict[str, Any] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            continue
        arrays[name] = value if isinstance(value, list) else None
        if isinstance(value, torch.Tensor):
            if not is_plain_tensor(value):
                raise InputError(
                    f"{path} is damaged: {sanitize_line(name, 100)} is not a tensor of numbers that it holds"
                )
            plain = value.detach()
            arrays[name] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return arrays


def make_class_labels(labels: Any, classes: Any, path: Path) -> list[str]:
    """Return the class of every image as text: its number, or its name in a list of classes.

    Raises
    ------
    InputError
        If labels are not one whole number from 0, or one name, per image.
    """
    values = np.asarray(labels)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2:
        raise InputError(
            f"{path} has labels of shape {list(values.shape)}: soft labels are not read, save one number "
            f"per image"
        )
    if values.ndim != 1:
        raise InputError(f"{path} has labels of shape {list(values.shape)}: expected one per image")
    if values.dtype.kind in "US":
        return [require_short_class_name(name, str(path)) for name in decode_texts(values)]
    if values.dtype.kind == "f" and (np.abs(values) < MAX_CLASSES).all() and (values % 1 == 0).all():
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu" or not ((values >= 0) & (values < MAX_CLASSES)).all():
        raise InputError(f"{path} has labels that are not whole numbers from 0: save the index of each class")
    label_numbers: list[int] = values.tolist()
    if classes is None:
        return [str(label) for label in label_numbers]
    names = decode_texts(classes)
    if len(names) <= max(label_numbers, default=-1):
        raise InputError(f"{path} has label {max(label_numbers)}, but names {len(names)} classes")
    names = [require_short_class_name(name, str(path)) for name in names]
    return [names[label] for label in label_numbers]


def decode_texts(texts: Collection[Any]) -> list[str]:
    """Return texts of an array or a list as str; numbers are written out."""
    values = texts.ravel().tolist() if isinstance(texts, np.ndarray) else texts
    return [text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in values]


def make_pixels(images: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
    """Return images of any supported layout and range as 8-bit values, channels last.

    Raises
    ------
    InputError
        If they have another shape, or values of unknown range.
    """
    if images.ndim == 3:
        images = images[..., None]
    channels = (1, 3)
    if images.ndim != 4 or not (images.shape[1] in channels or images.shape[3] in channels):
        raise InputError(
            f"{path} has images of shape {list(images.shape)}: expected (images, 3, height, width) or "
            f"(images, height, width, 3)"
        )
    if images.shape[1] in channels:
        images = images.transpose(0, 2, 3, 1)
    if 0 in images.shape:
        raise InputError(f"{path} holds no image: its images are of shape {list(images.shape)}")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iuf":
        raise InputError(f"{path} has images of type {images.dtype}: expected numbers in 0 to 1 or 0 to 255")
    low, high = float(images.min()), float(images.max())
    is_fraction = images.dtype.kind == "f" and high < BYTE_RANGE_START
    most = 1.0 if is_fraction else 255.0
    if not (-ROUNDING * most <= low and high <= most * (1 + ROUNDING)):  # nor if they are not numbers
        raise InputError(
            f"{path} has images with values from {low:.3g} to {high:.3g}: expected 0 to 1 or 0 to 255; if "
            f"they are normalised, save images * std + mean"
        )
    pixels = np.empty(images.shape, np.uint8)
    for target, image in zip(pixels, images, strict=True):
        target[:] = np.clip(np.rint(image.astype(np.float32) * (255 / most)), 0, 255)
    return pixels


def iterate_pillow_images(arrays: LabelledArrays) -> Iterator[tuple[Image.Image, str]]:
    """Yield every image, in RGB, with its label."""
    for pixels, label in zip(arrays.images, arrays.class_labels, strict=True):
        grey_or_rgb = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        yield Image.fromarray(np.ascontiguousarray(grey_or_rgb)).convert("RGB"), label
