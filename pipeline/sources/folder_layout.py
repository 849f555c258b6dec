"""Find the folders of a dataset's splits by their names and the class folders in them."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfm.errors import InputError
from sfm.paths import resolve_links
from sfm.pipeline.sources.file_tree import (
    SYSTEM_FOLDERS,
    describe_dangling_link,
    is_dangling_link,
    list_sorted_entries,
)
from sfm.pipeline.sources.inventory import (
    could_be_folder_name,
    format_counts_by_kind,
    get_unused_kind_from_extension,
    is_image_file,
)
from sfm.pipeline.sources.split_files import SPLIT_WORDS, find_split_named_in_path
from sfm.stats_store.class_lists import normalize_class_id
from sfm.text import format_names


@dataclass(frozen=True)
class FolderLayout:
    """The folders of the splits of a dataset.

    Attributes
    ----------
    train_folder : Path
    held_out_folder : Path or None
        None if no other folder holds training classes.
    unused_folders : tuple of Path
        Other folders, which are not used.
    notes : tuple of str
        Automatic choices, one line each.
    """

    train_folder: Path
    held_out_folder: Path | None
    unused_folders: tuple[Path, ...]
    notes: tuple[str, ...]


def find_folder_layout(
    spec: str, root: Path, train_folder_name: str | None, test_folder_name: str | None
) -> FolderLayout:
    """Find the folders of the splits by the words of ``SPLIT_WORDS``, in upper or lower case.

    Folders named by such a word come before those whose name contains one (``val2017``). A folder without any
    of the training classes, such as one of unlabelled images, is not held out.

    Raises
    ------
    InputError
        If there is no training folder, or several; lists the existing folders.
    """
    folders = [Path(entry.path) for entry in list_visible_subfolders(root)]
    by_name, by_word = group_by_exact_and_partial_split_name(folders)
    if train_folder_name is None and test_folder_name is None:
        classes = find_class_folders_named_like_splits(folders, by_name)
        if classes:
            names = format_folder_names(classes)
            note = f"{names} is taken for a class, not for a split: it holds no class folders"
            return FolderLayout(root, None, (), (note,))
    test = None if test_folder_name is None else require_split_folder(spec, root, test_folder_name)
    candidates = [*by_name["test"], *by_name["val"]]
    weak_candidates = [*by_word["test"], *by_word["val"]]
    if train_folder_name:
        training = [require_split_folder(spec, root, train_folder_name)]
    else:
        held_out = [test] if test else candidates or weak_candidates
        non_splits = [
            folder
            for folder in folders
            if find_split_named_in_path(folder.name) is None and folder not in held_out
        ]
        training = by_name["train"] or filter_train_candidates_by_shared_classes(
            by_word["train"], held_out, non_splits
        )
    if len(training) > 1:
        raise InputError(f"{spec} holds {format_folder_names(training)}: choose one with ?train=NAME")
    if not training:
        if test is not None or candidates or not folders:
            raise InputError(
                f"{spec} must hold train/, with one folder per class, and a held-out folder such as test/ or "
                f"val/; it holds {format_folder_names(folders)}: choose with ?train=NAME&test=NAME"
            )
        return FolderLayout(root, None, (), ())  # `root` has class folders; a later error suggests --hold-out
    train = training[0]
    if not list_class_folder_names(train):
        kinds = Counter(get_unused_kind_from_extension(entry.name) for entry in list_sorted_entries(train))
        raise InputError(
            f"{train} holds no class folders, only {format_counts_by_kind(kinds) or 'nothing'}: put the "
            f"images into one per class"
        )
    if test is not None:
        return make_folder_layout(folders, train, test, [])
    return make_layout_choosing_held_out(folders, train, candidates, weak_candidates)


def make_layout_choosing_held_out(
    root_subfolders: Sequence[Path],
    train_folder: Path,
    held_out_candidates: Sequence[Path],
    fallback_held_out_candidates: Sequence[Path],
) -> FolderLayout:
    """Return the layout with the first candidate that holds training classes held out."""
    held_out_candidates = [folder for folder in held_out_candidates if folder != train_folder]
    labelled = find_folders_sharing_classes_best_first(train_folder, held_out_candidates)
    labelled = labelled or find_folders_sharing_classes_best_first(train_folder, fallback_held_out_candidates)
    unlabelled = [folder for folder in held_out_candidates if folder not in labelled]
    notes = []
    if unlabelled:
        names = format_folder_names(unlabelled)
        notes.append(f"{names} is not used: it holds no folder of a training class")
    if len(labelled) > 1:
        others = format_folder_names(labelled[1:])
        notes.append(f"held out is {labelled[0].name}/, not {others}; ?test={labelled[1].name} chooses it")
    return make_folder_layout(root_subfolders, train_folder, labelled[0] if labelled else None, notes)


def group_by_exact_and_partial_split_name(
    folders: Iterable[Path],
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return, by split, the folders whose name is a split word, and those whose name contains one."""
    by_name: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    by_word: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    for folder in folders:
        if split := SPLIT_WORDS.get(re.sub(r"[-_ .]", "", folder.name.lower())):
            by_name[split].append(folder)
        elif split := find_split_named_in_path(folder.name):
            by_word[split].append(folder)
    return by_name, by_word


def find_class_folders_named_like_splits(
    folders: Collection[Path], folders_by_exact_split_name: Mapping[str, list[Path]]
) -> list[Path]:
    """Return the folders that are named like a split but are classes; none if one of them is a split.

    Split folders without class folders are no classes: their images are unsorted.
    """
    named = [folder for split_folders in folders_by_exact_split_name.values() for folder in split_folders]
    has_both_splits = 0 < len(folders_by_exact_split_name["train"]) < len(named)
    if has_both_splits or len(named) == len(folders) or any(map(list_class_folder_names, named)):
        return []
    return named if all(map(might_hold_images, folders)) else []


def might_hold_images(folder: Path) -> bool:
    """Return whether a folder holds an image or a folder, or cannot be listed."""
    try:
        entries = list_sorted_entries(folder)
    except OSError:
        return True  # The error is raised when its images are listed.
    visible = (entry for entry in entries if entry.name[0] != "." and not is_dangling_link(entry))
    return any(entry.is_dir() or (entry.is_file() and is_image_entry(entry)) for entry in visible)


def filter_train_candidates_by_shared_classes(
    train_candidates: Sequence[Path], held_out_folders: Sequence[Path], non_split_folders: Sequence[Path]
) -> list[Path]:
    """Return the candidates for training that share classes with a held-out folder.

    Empty if one shares classes with a folder of no split: classes may be called ``bullet train`` and
    ``test tube``, and have subfolders of equal names.
    """
    training = [
        folder
        for folder in train_candidates
        if find_folders_sharing_classes_best_first(folder, held_out_folders)
    ]
    return (
        []
        if any(find_folders_sharing_classes_best_first(folder, non_split_folders) for folder in training)
        else training
    )


def find_folders_sharing_classes_best_first(train_folder: Path, candidates: Sequence[Path]) -> list[Path]:
    """Return the folders that hold classes of a training folder; those that do not hold all come last."""
    classes = list_normalized_class_ids(train_folder)
    sharing = [
        folder
        for folder in candidates
        if folder != train_folder and classes & list_normalized_class_ids(folder)
    ]
    return sorted(sharing, key=lambda folder: classes != list_normalized_class_ids(folder))


def make_folder_layout(
    root_subfolders: Iterable[Path], train_folder: Path, held_out_folder: Path | None, notes: Sequence[str]
) -> FolderLayout:
    """Return a layout whose unused folders are those that are no split and hold none."""
    splits = [resolve_links(split) for split in (train_folder, held_out_folder) if split is not None]
    others = []
    for folder in root_subfolders:
        target = resolve_links(folder)
        if not any(split == target or target in split.parents for split in splits):
            others.append(folder)
    return FolderLayout(train_folder, held_out_folder, tuple(others), tuple(notes))


def require_split_folder(spec: str, root: Path, folder_name: str) -> Path:
    """Return the folder of a split that the user named.

    Raises
    ------
    InputError
        If there is none; lists the existing folders.
    """
    if (root / folder_name).is_dir():
        return root / folder_name
    names = format_folder_names([Path(entry.path) for entry in list_visible_subfolders(root)])
    raise InputError(f"{spec}: there is no folder {folder_name} in {root}; it holds {names}")


def explain_missing_held_out(spec: str, root: Path, layout: FolderLayout) -> str:
    """Return the error message for a dataset that has nothing held out."""
    if layout.held_out_folder is not None:
        return f"{layout.held_out_folder} holds no image"
    names = format_folder_names([Path(entry.path) for entry in list_visible_subfolders(root)])
    if layout.train_folder == root:
        return (
            f"{spec} must hold train/ and test/ (or val/), each with one folder per class; it holds {names}"
        )
    return (
        f"{spec} has no held-out folder (test/, val/, ...) with the classes of {layout.train_folder.name}/; "
        f"it holds {names}: choose one with ?test=NAME"
    )


def format_folder_names(folders: Sequence[Path]) -> str:
    """Return the names of some folders as text, for messages."""
    return format_names([f"{folder.name}/" for folder in folders]) or "no folders"


def could_be_split_or_class_folder(name: str) -> bool:
    """Return whether a name may be that of a split or class folder."""
    return "." not in name or (could_be_folder_name(name) and find_split_named_in_path(name) is not None)


def list_visible_subfolders(
    folder: Path, refuses_dangling_link: Callable[[str], bool] = could_be_split_or_class_folder
) -> list[os.DirEntry[str]]:
    """Return the folders in a folder, sorted by name, without hidden ones.

    Parameters
    ----------
    refuses_dangling_link : callable
        Given a name, returns whether a dangling link of that name stops the run.

    Raises
    ------
    InputError
        If the folder cannot be read, or a needed link is dangling.
    """
    try:
        entries = list_sorted_entries(folder)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    visible = [entry for entry in entries if entry.name[0] != "." and entry.name not in SYSTEM_FOLDERS]
    for entry in visible:
        if is_dangling_link(entry) and refuses_dangling_link(entry.name):
            raise InputError(describe_dangling_link(entry.path))
    return [entry for entry in visible if not is_dangling_link(entry) and entry.is_dir()]


def list_class_folder_names(split_folder: Path) -> list[str]:
    """Return the sorted names of the class folders of a split."""
    return [entry.name for entry in list_visible_subfolders(split_folder, could_be_folder_name)]


def list_normalized_class_ids(split_folder: Path) -> set[str]:
    """Return the class ids of a split: the names of its class folders, in Unicode normal form C."""
    return set(map(normalize_class_id, list_class_folder_names(split_folder)))


def is_image_entry(entry: os.DirEntry[str]) -> bool:
    """Return whether a file is to be read as an image.

    Raises
    ------
    InputError
        If it has to be opened to find out, and cannot be read.
    """
    try:
        return is_image_file(entry.path)
    except OSError as error:
        raise InputError(f"cannot read {entry.path}: {error.strerror or error}") from error
