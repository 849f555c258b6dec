"""``folder:PATH``: one folder per class under ``train/`` and under ``test/``, ``val/`` or the like."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfm.errors import InputError
from sfm.paths import expand_home, resolve_links
from sfm.pipeline.sources.class_labels import get_display_names
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.file_tree import (
    SYSTEM_FOLDERS,
    count_files_below,
    describe_dangling_link,
    is_dangling_link,
    scan_folder,
    walk_files,
)
from sfm.pipeline.sources.inventory import (
    HIDDEN_KIND,
    IMAGE_EXTENSIONS,
    Inventory,
    could_be_folder,
    format_counts,
    get_extension,
    get_unused_kind,
    is_image_file,
)
from sfm.pipeline.sources.source import NO_SAMPLES, Source, Split, compute_digest, file_split
from sfm.pipeline.sources.spec_options import parse_options, require_known_options
from sfm.pipeline.sources.split_files import SPLIT_WORDS, find_split_word
from sfm.stats_store.class_lists import class_id_from
from sfm.stats_store.names import folder_name
from sfm.text import format_names

LOOSE_IMAGES_KIND = "images outside of class folders"


@dataclass(frozen=True)
class FolderLayout:
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


def open_folder_source(text: str) -> Source:
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
    place, options = parse_options(text)
    require_known_options(f"folder:{text}", options, ("train", "test"))
    root = expand_home(place)
    if not root.is_dir():
        raise InputError(f"no dataset at folder:{text}: {root} is not a folder")
    layout = find_folder_layout(f"folder:{text}", root, options.get("train"), options.get("test"))
    unused = count_unused_files(root, layout)
    splits = [layout.train, *([layout.held_out] if layout.held_out else [])]
    ids = sorted({class_id for split in splits for class_id in list_class_folders(split)})
    return Source(
        name=folder_name(root),
        spec=f"folder:{text}",
        class_ids=ids,
        class_names=get_display_names([class_id_from(class_id) for class_id in ids]),
        train=make_folder_split(layout.train, ids, unused),
        test=make_folder_split(layout.held_out, ids, unused) if layout.held_out else NO_SAMPLES,
        decode=decode_image,
        inventory=Inventory(
            dict(unused), layout.notes, explain_missing_held_out(f"folder:{text}", root, layout)
        ),
    )


def find_folder_layout(spec: str, root: Path, train: str | None, test: str | None) -> FolderLayout:
    """Find the folders of the splits, by the words that all kinds of source know, in any capitals.

    Folders that are called by such a word come before those that hold one in their names (``val2017``). A
    folder without any of the training classes, such as one of unlabelled images, is not held out.

    Raises
    ------
    InputError
        If there is no training folder, or several; lists what is there.
    """
    folders = {entry.name: Path(entry.path) for entry in list_subfolders(root)}
    by_name, by_word = group_folders_by_split(folders.values())
    if (
        train is None
        and test is None
        and (called := find_classes_named_like_splits(folders.values(), by_name))
    ):
        note = (
            f"{format_folder_names(called)} is taken for a class, not for a split: it holds no class folders"
        )
        return FolderLayout(root, None, (), (note,))
    chosen = None if test is None else find_named_folder(spec, root, test)
    candidates = [*by_name["test"], *by_name["val"]]
    further = [*by_word["test"], *by_word["val"]]
    if train:
        training = [find_named_folder(spec, root, train)]
    else:
        held_out = [chosen] if chosen else candidates or further
        training = by_name["train"] or find_training_folders(folders.values(), by_word["train"], held_out)
    if len(training) > 1:
        raise InputError(f"{spec} holds {format_folder_names(training)}: choose one with ?train=NAME")
    if not training:
        if test is not None or candidates or not folders:
            raise InputError(
                f"{spec} must hold train/, with one folder per class, and a held-out folder such as test/ or "
                f"val/; it holds {format_folder_names(list(folders.values()))}: "
                f"choose with ?train=NAME&test=NAME"
            )
        return FolderLayout(
            root, None, (), ()
        )  # The class folders lie in it; what is to be held out is asked for.
    own = training[0]
    if not list_class_folders(own):
        found = format_counts(Counter(get_unused_kind(entry.name) for entry in scan_folder(own))) or "nothing"
        raise InputError(f"{own} holds no class folders, only {found}: put the images into one per class")
    if chosen is not None:
        return make_folder_layout(root, folders, own, chosen, [])
    candidates = [folder for folder in candidates if folder != own]
    labelled = find_folders_sharing_classes(own, candidates) or find_folders_sharing_classes(own, further)
    passed = [folder for folder in candidates if folder not in labelled]
    notes = []
    if passed:
        notes.append(f"{format_folder_names(passed)} is not used: it holds no folder of a training class")
    if len(labelled) > 1:
        others = format_folder_names(labelled[1:])
        notes.append(f"held out is {labelled[0].name}/, not {others}; ?test={labelled[1].name} chooses it")
    return make_folder_layout(root, folders, own, labelled[0] if labelled else None, notes)


def group_folders_by_split(folders: Iterable[Path]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the folders called as a split is, and those with such a word in their names, by split."""
    by_name: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    by_word: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    for folder in folders:
        if split := SPLIT_WORDS.get(re.sub(r"[-_ .]", "", folder.name.lower())):
            by_name[split].append(folder)
        elif split := find_split_word(folder.name):
            by_word[split].append(folder)
    return by_name, by_word


def find_classes_named_like_splits(
    folders: Collection[Path], by_name: Mapping[str, list[Path]]
) -> list[Path]:
    """Return the folders that are called as a split is, but are classes; none if one of them is a split.

    Both splits without class folders are no classes, but images that were not sorted.
    """
    called = [folder for split in by_name.values() for folder in split]
    both = 0 < len(by_name["train"]) < len(called)
    if both or len(called) == len(folders) or any(map(list_class_folders, called)):
        return []
    return called if all(map(could_be_class_folder, folders)) else []


def could_be_class_folder(folder: Path) -> bool:
    """Say whether a folder holds an image or a folder, or cannot be listed."""
    try:
        entries = scan_folder(folder)
    except OSError:
        return True  # It is named when its images are listed.
    shown = (entry for entry in entries if entry.name[0] != "." and not is_dangling_link(entry))
    return any(entry.is_dir() or (entry.is_file() and is_image_entry(entry)) for entry in shown)


def find_training_folders(
    folders: Iterable[Path], candidates: Sequence[Path], held_out: Sequence[Path]
) -> list[Path]:
    """Return the folders for training, of those with a word for it in their names.

    They have classes in common with a held-out folder, and with no folder that names no split: classes may be
    called ``bullet train`` and ``test tube``, and hold folders of equal names.
    """
    others = [folder for folder in folders if find_split_word(folder.name) is None and folder not in held_out]
    found = [folder for folder in candidates if find_folders_sharing_classes(folder, held_out)]
    return [] if any(find_folders_sharing_classes(folder, others) for folder in found) else found


def find_folders_sharing_classes(train: Path, folders: Sequence[Path]) -> list[Path]:
    """Return the folders that hold classes of a training folder; those that lack some come last."""
    classes = list_class_ids(train)
    sharing = [folder for folder in folders if folder != train and classes & list_class_ids(folder)]
    return sorted(sharing, key=lambda folder: classes != list_class_ids(folder))


def make_folder_layout(
    root: Path, folders: dict[str, Path], train: Path, held_out: Path | None, notes: Sequence[str]
) -> FolderLayout:
    """Put a layout together; all else in the folder is not read."""
    used = [resolve_links(split) for split in (train, held_out) if split is not None]
    others = [
        folder
        for folder in folders.values()
        if not any(split == resolve_links(folder) or resolve_links(folder) in split.parents for split in used)
    ]
    return FolderLayout(train, held_out, tuple(others), tuple(notes))


def find_named_folder(spec: str, root: Path, name: str) -> Path:
    """Return the folder of a split that the user names.

    Raises
    ------
    InputError
        If there is none; lists what is there.
    """
    if (root / name).is_dir():
        return root / name
    there = [Path(entry.path) for entry in list_subfolders(root)]
    raise InputError(f"{spec}: there is no folder {name} in {root}; it holds {format_folder_names(there)}")


def explain_missing_held_out(spec: str, root: Path, layout: FolderLayout) -> str:
    """Return what to say of a dataset if nothing is held out."""
    if layout.held_out is not None:
        return f"{layout.held_out} holds no image"
    there = format_folder_names([Path(entry.path) for entry in list_subfolders(root)])
    if layout.train == root:
        return (
            f"{spec} must hold train/ and test/ (or val/), each with one folder per class; it holds {there}"
        )
    return (
        f"{spec} has no held-out folder (test/, val/, ...) with the classes of {layout.train.name}/; it "
        f"holds {there}: choose one with ?test=NAME"
    )


def format_folder_names(folders: Sequence[Path]) -> str:
    """Return the names of folders as text."""
    return format_names([f"{folder.name}/" for folder in folders]) or "no folders"


def could_be_split_folder(name: str) -> bool:
    """Say whether what cannot be opened may be a folder beside others, to go by its name."""
    return "." not in name or (could_be_folder(name) and find_split_word(name) is not None)


def list_subfolders(
    folder: Path, matters: Callable[[str], bool] = could_be_split_folder
) -> list[os.DirEntry[str]]:
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
        if is_dangling_link(entry) and matters(entry.name):
            raise InputError(describe_dangling_link(entry.path))
    return [entry for entry in shown if not is_dangling_link(entry) and entry.is_dir()]


def list_class_folders(split: Path) -> list[str]:
    """Return the sorted names of the class folders of a split."""
    return [entry.name for entry in list_subfolders(split, could_be_folder)]


def list_class_ids(split: Path) -> set[str]:
    """Return the ids of the classes of a split; its folders may be named in either Unicode normal form."""
    return set(map(class_id_from, list_class_folders(split)))


def count_unused_files(root: Path, layout: FolderLayout) -> Counter[str]:
    """Count the files beside the class folders, by kind and by the folder that holds them."""
    unused = Counter({f"in {folder.name}/": count_files_below(folder) for folder in layout.others})
    for folder in dict.fromkeys((root, layout.train, layout.held_out)):
        if folder is None:
            continue
        for entry in scan_folder(folder):
            if entry.name[0] == ".":
                unused[HIDDEN_KIND] += 1
            elif is_dangling_link(entry) or not entry.is_dir():
                loose = (
                    folder in (layout.train, layout.held_out)
                    and get_extension(entry.name) in IMAGE_EXTENSIONS
                )
                unused[LOOSE_IMAGES_KIND if loose else get_unused_kind(entry.name)] += 1
    return +unused


def make_folder_split(root: Path, class_ids: list[str], unused: Counter[str]) -> Split:
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
            if not is_image_entry(entry):
                others[get_unused_kind(entry.name)] += 1
                continue
            status = entry.stat()
            names.append(f"{class_id}/{path}")
            labels.append(label)
            seen.append(f"{names[-1]} {status.st_size} {status.st_mtime_ns}")
        if len(names) == before and others:
            raise InputError(
                f"{root / class_id} holds no image, only {format_counts(others)}; remove the folder or add "
                f"images"
            )
        unused.update(others)

    return file_split(
        labels=np.array(labels, dtype=np.int32),
        class_ids=class_ids,
        path=lambda i: f"{root}/{names[i]}",
        listing=compute_digest(str(root.resolve()), "\n".join(seen)),
    )


def is_image_entry(entry: os.DirEntry[str]) -> bool:
    """Say whether a file is to be read as an image.

    Raises
    ------
    InputError
        If it has to be opened to tell, and cannot be.
    """
    try:
        return is_image_file(entry.path)
    except OSError as error:
        raise InputError(f"cannot read {entry.path}: {error.strerror or error}") from error
