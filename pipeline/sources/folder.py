"""``folder:PATH``: one folder per class under ``train/`` and under ``test/`` or ``val/``."""

import os
from pathlib import Path

import numpy as np

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.classes import display_names
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.source import Source, Split, digest_of, file_split


def folder_source(text: str) -> Source:
    """Open a folder of class folders.

    Parameters
    ----------
    text : str
        Path of the folder that holds ``train/`` and ``test/`` or ``val/``.

    Raises
    ------
    InputError
        If a folder is missing, or the two splits hold different classes.
    """
    root = expand_home(text)
    if not root.is_dir():
        raise InputError(f"no dataset at folder:{text}: {root} is not a folder")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        raise InputError(
            f"folder:{text} must hold train/ and test/ (or val/), each with one folder per class"
        )
    train_ids, test_ids = class_folders(root / "train"), class_folders(held_out)
    if train_ids != test_ids:
        odd = sorted(set(train_ids) ^ set(test_ids))
        raise InputError(
            f"train/ and {held_out.name}/ of folder:{text} hold different classes: "
            f"{', '.join(odd[:5])}{' …' if len(odd) > 5 else ''} in one only"
        )
    return Source(
        name=root.resolve().name,
        spec=f"folder:{text}",
        class_ids=train_ids,
        class_names=display_names(train_ids),
        train=folder_split(root / "train", train_ids),
        test=folder_split(held_out, test_ids),
        decode=decode_image,
    )


def class_folders(split: Path) -> list[str]:
    """Return the sorted names of the class folders of a split; hidden ones are not classes."""
    return sorted(
        entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith(".")
    )


def folder_split(root: Path, class_ids: list[str]) -> Split:
    """List the files of every class folder, with sizes and times of change, by class and name."""
    names: list[str] = []
    labels: list[int] = []
    seen: list[str] = []
    for label, class_id in enumerate(class_ids):
        files = sorted(
            (entry for entry in os.scandir(root / class_id) if entry.is_file() and entry.name[0] != "."),
            key=lambda entry: entry.name,
        )
        for entry in files:
            status = entry.stat()
            names.append(f"{class_id}/{entry.name}")
            labels.append(label)
            seen.append(f"{names[-1]} {status.st_size} {status.st_mtime_ns}")

    return file_split(
        labels=np.array(labels, dtype=np.int32),
        class_ids=class_ids,
        path=lambda i: f"{root}/{names[i]}",
        listing=digest_of(str(root.resolve()), "\n".join(seen)),
    )
