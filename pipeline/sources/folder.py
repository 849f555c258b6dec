"""``folder:PATH``: one folder per class under ``train/`` and under ``test/``, ``val/`` or the like."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfm.errors import InputError
from sfm.paths import expand_home, resolved
from sfm.pipeline.sources.classes import display_names
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.inventory import (
    HIDDEN,
    IMAGES,
    Inventory,
    describe_kinds,
    extension_of,
    holds_image,
    kind_of,
    may_name_folder,
)
from sfm.pipeline.sources.options import require_known, split_options
from sfm.pipeline.sources.source import NO_SAMPLES, Source, Split, digest_of, file_split, some
from sfm.pipeline.sources.splits import SPLIT_WORDS, split_word
from sfm.pipeline.sources.walk import (
    SYSTEM_FOLDERS,
    count_files_below,
    dangling_link,
    leads_nowhere,
    scan_folder,
    walk_files,
)
from sfm.stats_store.class_lists import normalize_class_id
from sfm.stats_store.dataset_names import make_name_from_folder

LOOSE_IMAGES = "images outside of class folders"


@dataclass(frozen=True)
class Layout:
    """Where the splits of a dataset of folders are.

    Attributes
    ----------
    train : Path
    held_out : Path or None
        None if no folder holds classes that are those of the training split.
    others : tuple of Path
        Folders beside them, which are not read.
    notes : tuple of str
        What was chosen where there was a choice.
    """

    train: Path
    held_out: Path | None
    others: tuple[Path, ...]
    notes: tuple[str, ...]


def folder_source(text: str) -> Source:
    """Open a folder of class folders.

    Parameters
    ----------
    text : str
        Path of the folder that holds ``train/`` and ``test/`` or ``val/``; ``?train=NAME`` and ``?test=NAME``
        choose folders of other names. Without any of them, of the folder that holds the class folders.

    Raises
    ------
    InputError
        If a folder is missing, or the splits cannot be told apart.
    """
    place, options = split_options(text)
    require_known(f"folder:{text}", options, ("train", "test"))
    root = expand_home(place)
    if not root.is_dir():
        raise InputError(f"no dataset at folder:{text}: {root} is not a folder")
    layout = find_layout(f"folder:{text}", root, options.get("train"), options.get("test"))
    unused = count_beside(root, layout)
    splits = [layout.train, *([layout.held_out] if layout.held_out else [])]
    ids = sorted({class_id for split in splits for class_id in class_folders(split)})
    return Source(
        name=make_name_from_folder(root),
        spec=f"folder:{text}",
        class_ids=ids,
        class_names=display_names([normalize_class_id(class_id) for class_id in ids]),
        train=folder_split(layout.train, ids, unused),
        test=folder_split(layout.held_out, ids, unused) if layout.held_out else NO_SAMPLES,
        decode=decode_image,
        inventory=Inventory(dict(unused), layout.notes, no_held_out(f"folder:{text}", root, layout)),
    )


def find_layout(spec: str, root: Path, train: str | None, test: str | None) -> Layout:
    """Find the folders of the splits, by the words that all kinds of source know, in any capitals.

    Folders that are called by such a word come before those that hold one in their names (``val2017``). A
    folder without any of the training classes, such as one of unlabelled images, is not held out.

    Raises
    ------
    InputError
        If there is no training folder, or several; lists what is there.
    """
    folders = {entry.name: Path(entry.path) for entry in subfolders(root)}
    by_name, by_word = folders_by_split(folders.values())
    if train is None and test is None and (called := classes_called_splits(folders.values(), by_name)):
        note = f"{listed(called)} is taken for a class, not for a split: it holds no class folders"
        return Layout(root, None, (), (note,))
    chosen = None if test is None else named_folder(spec, root, test)
    candidates = [*by_name["test"], *by_name["val"]]
    further = [*by_word["test"], *by_word["val"]]
    if train:
        training = [named_folder(spec, root, train)]
    else:
        held_out = [chosen] if chosen else candidates or further
        training = by_name["train"] or training_by_word(folders.values(), by_word["train"], held_out)
    if len(training) > 1:
        raise InputError(f"{spec} holds {listed(training)}: choose one with ?train=NAME")
    if not training:
        if test is not None or candidates or not folders:
            raise InputError(
                f"{spec} must hold train/, with one folder per class, and a held-out folder such as test/ or "
                f"val/; it holds {listed(list(folders.values()))}: choose with ?train=NAME&test=NAME"
            )
        return Layout(root, None, (), ())  # The class folders lie in it; what is to be held out is asked for.
    own = training[0]
    if not class_folders(own):
        found = describe_kinds(Counter(kind_of(entry.name) for entry in scan_folder(own))) or "nothing"
        raise InputError(f"{own} holds no class folders, only {found}: put the images into one per class")
    if chosen is not None:
        return layout_of(root, folders, own, chosen, [])
    candidates = [folder for folder in candidates if folder != own]
    labelled = with_classes_of(own, candidates) or with_classes_of(own, further)
    passed = [folder for folder in candidates if folder not in labelled]
    notes = []
    if passed:
        notes.append(f"{listed(passed)} is not used: it holds no folder of a training class")
    if len(labelled) > 1:
        others = listed(labelled[1:])
        notes.append(f"held out is {labelled[0].name}/, not {others}; ?test={labelled[1].name} chooses it")
    return layout_of(root, folders, own, labelled[0] if labelled else None, notes)


def folders_by_split(folders: Iterable[Path]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the folders called as a split is, and those with such a word in their names, by split."""
    by_name: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    by_word: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    for folder in folders:
        if split := SPLIT_WORDS.get(re.sub(r"[-_ .]", "", folder.name.lower())):
            by_name[split].append(folder)
        elif split := split_word(folder.name):
            by_word[split].append(folder)
    return by_name, by_word


def classes_called_splits(folders: Collection[Path], by_name: Mapping[str, list[Path]]) -> list[Path]:
    """Return the folders that are called as a split is, but are classes; none if one of them is a split.

    Both splits without class folders are no classes, but images that were not sorted.
    """
    called = [folder for split in by_name.values() for folder in split]
    both = 0 < len(by_name["train"]) < len(called)
    if both or len(called) == len(folders) or any(map(class_folders, called)):
        return []
    return called if all(map(may_be_class, folders)) else []


def may_be_class(folder: Path) -> bool:
    """Say whether a folder holds an image or a folder, or cannot be listed."""
    try:
        entries = scan_folder(folder)
    except OSError:
        return True  # It is named when its images are listed.
    shown = (entry for entry in entries if entry.name[0] != "." and not leads_nowhere(entry))
    return any(entry.is_dir() or (entry.is_file() and is_image(entry)) for entry in shown)


def training_by_word(
    folders: Iterable[Path], candidates: Sequence[Path], held_out: Sequence[Path]
) -> list[Path]:
    """Return the folders for training, of those with a word for it in their names.

    They have classes in common with a held-out folder, and with no folder that names no split: classes may be
    called ``bullet train`` and ``test tube``, and hold folders of equal names.
    """
    others = [folder for folder in folders if split_word(folder.name) is None and folder not in held_out]
    found = [folder for folder in candidates if with_classes_of(folder, held_out)]
    return [] if any(with_classes_of(folder, others) for folder in found) else found


def with_classes_of(train: Path, folders: Sequence[Path]) -> list[Path]:
    """Return the folders that hold classes of a training folder; those that lack some come last."""
    classes = class_ids_in(train)
    sharing = [folder for folder in folders if folder != train and classes & class_ids_in(folder)]
    return sorted(sharing, key=lambda folder: classes != class_ids_in(folder))


def layout_of(
    root: Path, folders: dict[str, Path], train: Path, held_out: Path | None, notes: Sequence[str]
) -> Layout:
    """Put a layout together; all else in the folder is not read."""
    used = [resolved(split) for split in (train, held_out) if split is not None]
    others = [
        folder
        for folder in folders.values()
        if not any(split == resolved(folder) or resolved(folder) in split.parents for split in used)
    ]
    return Layout(train, held_out, tuple(others), tuple(notes))


def named_folder(spec: str, root: Path, name: str) -> Path:
    """Return the folder of a split that the user names.

    Raises
    ------
    InputError
        If there is none; lists what is there.
    """
    if (root / name).is_dir():
        return root / name
    there = [Path(entry.path) for entry in subfolders(root)]
    raise InputError(f"{spec}: there is no folder {name} in {root}; it holds {listed(there)}")


def no_held_out(spec: str, root: Path, layout: Layout) -> str:
    """Return what to say of a dataset if nothing is held out."""
    if layout.held_out is not None:
        return f"{layout.held_out} holds no image"
    there = listed([Path(entry.path) for entry in subfolders(root)])
    if layout.train == root:
        return (
            f"{spec} must hold train/ and test/ (or val/), each with one folder per class; it holds {there}"
        )
    return (
        f"{spec} has no held-out folder (test/, val/, ...) with the classes of {layout.train.name}/; it "
        f"holds {there}: choose one with ?test=NAME"
    )


def listed(folders: Sequence[Path]) -> str:
    """Return the names of folders as text."""
    return some([f"{folder.name}/" for folder in folders]) or "no folders"


def may_name_split(name: str) -> bool:
    """Say whether what cannot be opened may be a folder beside others, to go by its name."""
    return "." not in name or (may_name_folder(name) and split_word(name) is not None)


def subfolders(folder: Path, matters: Callable[[str], bool] = may_name_split) -> list[os.DirEntry[str]]:
    """Return the folders in a folder, by name; hidden ones are not meant.

    Parameters
    ----------
    matters : callable
        Says whether a link of that name that leads nowhere stops the run.

    Raises
    ------
    InputError
        If it cannot be read, or a link that matters leads nowhere.
    """
    try:
        entries = scan_folder(folder)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    shown = [entry for entry in entries if entry.name[0] != "." and entry.name not in SYSTEM_FOLDERS]
    for entry in shown:
        if leads_nowhere(entry) and matters(entry.name):
            raise InputError(dangling_link(entry.path))
    return [entry for entry in shown if not leads_nowhere(entry) and entry.is_dir()]


def class_folders(split: Path) -> list[str]:
    """Return the sorted names of the class folders of a split."""
    return [entry.name for entry in subfolders(split, may_name_folder)]


def class_ids_in(split: Path) -> set[str]:
    """Return the ids of the classes of a split; its folders may be named in either Unicode normal form."""
    return set(map(normalize_class_id, class_folders(split)))


def count_beside(root: Path, layout: Layout) -> Counter[str]:
    """Count the files beside the class folders, by kind and by the folder that holds them."""
    unused = Counter({f"in {folder.name}/": count_files_below(folder) for folder in layout.others})
    for folder in dict.fromkeys((root, layout.train, layout.held_out)):
        if folder is None:
            continue
        for entry in scan_folder(folder):
            if entry.name[0] == ".":
                unused[HIDDEN] += 1
            elif leads_nowhere(entry) or not entry.is_dir():
                loose = folder in (layout.train, layout.held_out) and extension_of(entry.name) in IMAGES
                unused[LOOSE_IMAGES if loose else kind_of(entry.name)] += 1
    return +unused


def folder_split(root: Path, class_ids: list[str], unused: Counter[str]) -> Split:
    """List the images in every class folder and below, with sizes and times of change, by class and name.

    Parameters
    ----------
    unused : Counter
        Gets the files that are no images, by kind.

    Raises
    ------
    InputError
        If a folder cannot be read, a link leads nowhere, or a class holds files but no image.
    """
    names: list[str] = []
    labels: list[int] = []
    seen: list[str] = []
    for label, class_id in enumerate(class_ids):
        if not (root / class_id).is_dir():
            continue
        before, others = len(names), Counter[str]()
        for path, entry in walk_files(str(root / class_id), others):
            if not is_image(entry):
                others[kind_of(entry.name)] += 1
                continue
            status = entry.stat()
            names.append(f"{class_id}/{path}")
            labels.append(label)
            seen.append(f"{names[-1]} {status.st_size} {status.st_mtime_ns}")
        if len(names) == before and others:
            raise InputError(
                f"{root / class_id} holds no image, only {describe_kinds(others)}; remove the folder or add "
                f"images"
            )
        unused.update(others)

    return file_split(
        labels=np.array(labels, dtype=np.int32),
        class_ids=class_ids,
        path=lambda i: f"{root}/{names[i]}",
        listing=digest_of(str(root.resolve()), "\n".join(seen)),
    )


def is_image(entry: os.DirEntry[str]) -> bool:
    """Say whether a file is to be read as an image.

    Raises
    ------
    InputError
        If it has to be opened to tell, and cannot be.
    """
    try:
        return holds_image(entry.path)
    except OSError as error:
        raise InputError(f"cannot read {entry.path}: {error.strerror or error}") from error
