"""``torchvision:NAME?root=PATH``: the classification datasets of torchvision."""

import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.class_labels import make_zero_padded_class_id, normalize_name_for_comparison
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.file_tree import describe_dangling_link
from sfm.pipeline.sources.source import Source, Split, compute_digest, make_file_split, make_indexed_split
from sfm.pipeline.sources.spec_options import (
    parse_yes_no_option,
    require_known_options,
    split_location_and_options,
)
from sfm.text import get_first_error_line, sanitize_line

_BOOLEAN = ({"train": True}, {"train": False})
_TRAIN_TEST = ({"split": "train"}, {"split": "test"})
_TRAINVAL_TEST = ({"split": "trainval"}, {"split": "test"})
_TRAIN_VAL = ({"split": "train"}, {"split": "val"})

SPLIT_ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CIFAR10": _BOOLEAN,
    "CIFAR100": _BOOLEAN,
    "Country211": _TRAIN_TEST,
    "DTD": _TRAIN_TEST,
    "FashionMNIST": _BOOLEAN,
    "FGVCAircraft": _TRAINVAL_TEST,
    "Flowers102": _TRAIN_TEST,
    "Food101": _TRAIN_TEST,
    "GTSRB": _TRAIN_TEST,
    "ImageNet": _TRAIN_VAL,
    "Imagenette": _TRAIN_VAL,
    "KMNIST": _BOOLEAN,
    "MNIST": _BOOLEAN,
    "OxfordIIITPet": _TRAINVAL_TEST,
    "Places365": ({"split": "train-standard"}, {"split": "val"}),
    "QMNIST": _BOOLEAN,
    "RenderedSST2": _TRAIN_TEST,
    "StanfordCars": _TRAIN_TEST,
    "STL10": _TRAIN_TEST,
    "SVHN": _TRAIN_TEST,
    "USPS": _BOOLEAN,
}
"""Arguments of each dataset that choose its training and its held-out split."""


def open_torchvision_source(place_with_options: str) -> Source:
    """Open a dataset that torchvision can read.

    Parameters
    ----------
    place_with_options : str
        ``NAME?root=PATH``, where PATH is torchvision's ``root``; ``download=yes`` fetches what is missing.

    Raises
    ------
    InputError
        If the dataset is unknown or missing.
    """
    spec = f"torchvision:{place_with_options}"
    name, options = split_location_and_options(place_with_options)
    require_known_options(spec, options, ("root", "download"))
    if name not in SPLIT_ARGUMENTS:
        close = difflib.get_close_matches(name.lower(), [known.lower() for known in SPLIT_ARGUMENTS], n=1)
        suggestion = next((known for known in SPLIT_ARGUMENTS if close and known.lower() == close[0]), None)
        hint = f"did you mean {suggestion}?" if suggestion else f"there are {', '.join(SPLIT_ARGUMENTS)}"
        raise InputError(f"no dataset torchvision:{name} with class labels and two splits: {hint}")
    if "root" not in options:
        raise InputError(f"{spec} does not say where the dataset is: write torchvision:{name}?root=PATH")
    root, download = expand_home(options["root"]), parse_yes_no_option(spec, options, "download")
    train, test = (
        open_torchvision_split(spec, name, root, download, arguments) for arguments in SPLIT_ARGUMENTS[name]
    )
    labels = [get_label_numbers(train), get_label_numbers(test)]
    ids, names = make_class_ids_and_names(train, labels)
    if any(not len(numbers) or numbers.min() < 0 or numbers.max() >= len(ids) for numbers in labels):
        raise InputError(f"cannot open {spec}: labels are not those of {len(ids)} classes; fetch it again")
    return Source(
        name=name.lower(),
        spec=spec,
        class_ids=sorted(ids),
        class_names=[names[number] for number in sorted(range(len(ids)), key=ids.__getitem__)],
        train=make_torchvision_split(train, f"train split of torchvision:{name}", labels[0], ids),
        test=make_torchvision_split(test, f"held-out split of torchvision:{name}", labels[1], ids),
        decode=decode_image,
    )


def open_torchvision_split(
    spec: str, dataset_name: str, root: Path, allow_download: bool, split_arguments: dict[str, Any]
) -> Any:
    """Return a split as a dataset of torchvision.

    Raises
    ------
    InputError
        If the dataset is missing or incomplete.
    """
    import torchvision.datasets

    # ImageNet cannot be downloaded and has no such argument.
    download_argument = {"download": True} if allow_download else {}
    try:
        return getattr(torchvision.datasets, dataset_name)(root, **split_arguments, **download_argument)
    except Exception as error:  # torchvision and scipy may raise any exception on damaged files.
        hint = "" if allow_download else ", or fetch it with &download=yes"
        line = sanitize_line(get_first_error_line(error), 300)
        raise InputError(
            f"cannot open {spec}: {line}; put the dataset under {root} as torchvision expects it{hint}"
        ) from error


def get_label_numbers(dataset: Any) -> npt.NDArray[np.int64]:
    """Return the label numbers of a torchvision dataset, shape (n,)."""
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute), dtype=np.int64)
    return np.array([label for _, label in dataset._samples], dtype=np.int64)


def list_image_files_unless_arrays(dataset: Any) -> list[str] | None:
    """Return the image files of a torchvision dataset; None if it holds arrays."""
    if hasattr(dataset, "data"):
        return None
    for attribute in ("_image_files", "_images"):
        if hasattr(dataset, attribute):
            return [os.fspath(path) for path in getattr(dataset, attribute)]
    pairs = dataset.imgs if hasattr(dataset, "imgs") else dataset._samples
    return [os.fspath(path) for path, _ in pairs]


def make_class_ids_and_names(
    dataset: Any, label_numbers_of_splits: list[npt.NDArray[np.int64]]
) -> tuple[list[str], list[str]]:
    """Return class ids and display names, by label number.

    Ids are WordNet ids if the dataset has them, else its class names if they differ, else numbers.
    """
    count = 1 + max(int(split.max(initial=0)) for split in label_numbers_of_splits)
    names = [
        name if isinstance(name, str) else name[0]
        for name in getattr(dataset, "classes", map(make_zero_padded_class_id, range(count)))
    ]
    if hasattr(dataset, "wnids"):
        return list(dataset.wnids), names
    if len({normalize_name_for_comparison(name) for name in names}) == len(names):
        return names, names
    return [make_zero_padded_class_id(label) for label in range(len(names))], names


def make_torchvision_split(
    dataset: Any, location: str, label_numbers: npt.NDArray[np.int64], class_ids_by_number: list[str]
) -> Split:
    """Return the split of a torchvision dataset; arrays are encoded as portable pixmaps."""
    position_by_number = np.argsort(np.argsort(class_ids_by_number)).astype(np.int32)
    sorted_labels = position_by_number[label_numbers]
    files = list_image_files_unless_arrays(dataset)
    if files is None:
        return make_indexed_split(
            labels=sorted_labels,
            class_ids=sorted(class_ids_by_number),
            read=lambda i: encode_as_portable_pixmap(np.asarray(dataset.data[i])),
            location=lambda i: f"image {i} of the {location}",
            listing_digest=compute_digest(
                location,
                str(len(label_numbers)),
                label_numbers.tobytes(),
                np.asarray(dataset.data[:64]).tobytes(),
            ),
        )
    return make_file_split(
        labels=sorted_labels,
        class_ids=sorted(class_ids_by_number),
        path=files.__getitem__,
        listing_digest=compute_digest(
            location, label_numbers.tobytes(), *(describe_file_state(path) for path in files)
        ),
    )


def describe_file_state(path: str) -> str:
    """Return path, size and modification time of a file, as text for a digest.

    Raises
    ------
    InputError
        If it is missing, or a dangling link.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        if Path(path).is_symlink():
            raise InputError(describe_dangling_link(path)) from error
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def encode_as_portable_pixmap(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode pixels as a binary PGM or PPM file: lossless, and the same bytes everywhere.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (y, x), (y, x, 3) or (3, y, x)
    """
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    kind = "P5" if pixels.ndim == 2 else "P6"
    return f"{kind}\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes()
