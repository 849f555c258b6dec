"""Assign the files of a dataset to splits by the words in their paths.

The words are those of the ``datasets`` library, in upper or lower case, the same for every kind of source.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import (
    DataFile,
    find_files_by_pattern,
    is_remote_url,
    list_files_below,
    resolve_local_path,
)
from sfm.pipeline.sources.inventory import Inventory, could_be_folder_name, get_unused_kind_from_extension
from sfm.text import format_names

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "heldout": "test",
    "holdout": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
SPLIT_WORDS_HELP = "train or training; test, testing, eval or held-out; val, valid, validation or dev"

_WORD = re.compile(r"[a-z]+")
_HELD_OUT = re.compile(r"h(?:eld|old)[-_ ]out")
_PART_COUNT = re.compile(r"-of-\d+")


@dataclass(frozen=True)
class SplitFiles:
    """The files of both splits of a dataset.

    Attributes
    ----------
    train, test : list of DataFile
        `test` is empty without a held-out split; the inventory has the reason.
    inventory : Inventory
    unused_val : list of DataFile
        Files that can be held out instead of `test`, unless the user chose splits.
    detected_test_split : str
        The split that the words in the paths of `test` name: test or val; "" if the user chose the files.
    """

    train: list[DataFile]
    test: list[DataFile]
    inventory: Inventory
    unused_val: list[DataFile] = field(default_factory=list)
    detected_test_split: str = ""

    def replace_unlabelled_test_by_val_or_none(self, has_labels: Callable[[DataFile], bool]) -> "SplitFiles":
        """Use ``val`` as held-out files if ``test`` has no labels, as in competitions; return the result.

        If ``val`` has no labels either, nothing is held out. Choices of the user are kept.
        """
        if not self.detected_test_split or any(map(has_labels, self.test)):
            return self
        name = posixpath.basename(self.test[0].url)
        if self.unused_val:
            note = f"held out is val: {self.detected_test_split} has no labels ({name})"
            unused = Counter(self.inventory.unused_by_kind) - Counter({"of val": len(self.unused_val)})
            files = SplitFiles(
                self.train, self.unused_val, Inventory(dict(unused), (note,)), detected_test_split="val"
            )
            files = files.replace_unlabelled_test_by_val_or_none(has_labels)
        else:
            note = f"{self.detected_test_split} is not used: it has no labels ({name})"
            reason = f"there is no held-out split to use: {self.detected_test_split} has no labels ({name})"
            files = SplitFiles(self.train, [], Inventory(self.inventory.unused_by_kind, (note,), reason))
        inventory = files.inventory.with_more_unused(f"of {self.detected_test_split}", len(self.test))
        return replace(files, inventory=inventory)


def find_split_named_in_path(path: str) -> str | None:
    """Return the split that a path names by a word: train, test or val; None if it names none."""
    text = _HELD_OUT.sub("heldout", path.lower())
    return next((SPLIT_WORDS[word] for word in _WORD.findall(text) if word in SPLIT_WORDS), None)


def find_split_files(
    path_or_pattern: str,
    file_suffixes: tuple[str, ...],
    train_split_name: str | None = None,
    test_split_name_or_pattern: str | None = None,
) -> SplitFiles:
    """Find the files of both splits of a dataset.

    Parameters
    ----------
    path_or_pattern : str
        A folder, prefix or pattern that holds both splits, distinguished by words in paths; or a pattern of
        training files.
    file_suffixes : tuple of str
        File names in a folder end in one of these.
    train_split_name, test_split_name_or_pattern : str, optional
        Of a folder or prefix: names of the splits. Beside a pattern of training files,
        `test_split_name_or_pattern` is a pattern of held-out files; without a slash it is relative to the
        training files' folder.

    Raises
    ------
    InputError
        If nothing is found, the splits are ambiguous, files are of no known split, or the folder holds
        several datasets.
    """
    is_pattern = any(sign in path_or_pattern for sign in "{*") or path_or_pattern.endswith(file_suffixes)
    if is_pattern and train_split_name is not None:
        raise InputError(
            f"{path_or_pattern} names files: ?train= chooses among those of a folder; leave it out"
        )
    if is_pattern and test_split_name_or_pattern is not None:
        test_pattern = (
            test_split_name_or_pattern
            if "/" in test_split_name_or_pattern
            else posixpath.join(posixpath.dirname(path_or_pattern), test_split_name_or_pattern)
        )
        return SplitFiles(
            find_files_by_pattern(path_or_pattern), find_files_by_pattern(test_pattern), Inventory()
        )
    if test_split_name_or_pattern is not None and (
        any(sign in test_split_name_or_pattern for sign in "{*/")
        or test_split_name_or_pattern.endswith(file_suffixes)
    ):
        raise InputError(
            f"{path_or_pattern} is a folder: ?test= takes the name of a split in it, such as val; name the "
            f"training files, too, to use a pattern: {path_or_pattern.rstrip('/')}/train-*{file_suffixes[0]}"
            f"?test={test_split_name_or_pattern}"
        )
    unused: Counter[str] = Counter()
    if is_pattern:
        root, files = (
            posixpath.dirname(re.split(r"[{*]", path_or_pattern)[0]),
            find_files_by_pattern(path_or_pattern),
        )
    else:
        root = path_or_pattern.rstrip("/") or "/"
        files = list_data_files(root, file_suffixes, unused)
    base = root if is_remote_url(root) else str(resolve_local_path(root))
    file_by_path = {file.url.removeprefix(base).lstrip("/"): file for file in files}
    chosen = divide_paths_into_splits(
        path_or_pattern, list(file_by_path), train_split_name, test_split_name_or_pattern
    )
    if not is_pattern:
        require_one_dataset(path_or_pattern, chosen.train, chosen.test)
    for path in file_by_path.keys() - {*chosen.train, *chosen.test}:
        unused[f"of {find_split_named_in_path(path) or 'other splits'}"] += 1
    return SplitFiles(
        [file_by_path[path] for path in chosen.train],
        [file_by_path[path] for path in chosen.test],
        Inventory(dict(unused), chosen.notes, chosen.no_held_out_reason),
        [file_by_path[path] for path in chosen.unused_val],
        find_split_named_in_path(chosen.test[0]) or ""
        if chosen.test and test_split_name_or_pattern is None
        else "",
    )


def list_data_files(
    root: str, file_suffixes: tuple[str, ...], unused_by_kind: Counter[str]
) -> list[DataFile]:
    """Return the files of a folder or prefix whose names end in one of some suffixes; count the others.

    Raises
    ------
    InputError
        If there is none, or a link that may be one is dangling.
    """

    def is_needed(path: str) -> bool:
        return path.endswith(file_suffixes) or could_be_folder_name(path)

    files = []
    for file in list_files_below(root, unused_by_kind, is_needed):
        if file.url.endswith(file_suffixes):
            files.append(file)
        else:
            unused_by_kind[get_unused_kind_from_extension(file.url)] += 1
    if not files:
        raise InputError(f"no file that ends in {file_suffixes[0]} under {root}")
    return files


@dataclass(frozen=True)
class _SplitPaths:
    train: list[str]
    test: list[str]
    notes: tuple[str, ...] = ()
    no_held_out_reason: str = ""
    unused_val: tuple[str, ...] = ()


def divide_paths_into_splits(
    location: str, paths: Sequence[str], train_split_name: str | None, test_split_name: str | None
) -> _SplitPaths:
    """Assign files to splits by their paths below the dataset's folder.

    Raises
    ------
    InputError
        If there is no training file, or a file is of no known split.
    """
    paths_by_word: dict[str | None, list[str]] = {"train": [], "test": [], "val": [], None: []}
    for path in paths:
        paths_by_word[find_split_named_in_path(path)].append(path)
    hint = "choose with ?train=NAME&test=NAME, or write PATTERN?test=PATTERN"
    if train_split_name is None and test_split_name is None and len(paths_by_word[None]) == len(paths):
        reason = (
            f"cannot tell training from held-out files in {location} by words in their names "
            f"({SPLIT_WORDS_HELP}): {hint}"
        )
        return _SplitPaths(list(paths), [], no_held_out_reason=reason)
    if test_split_name:
        held_out = find_paths_of_split(location, paths, test_split_name, paths_by_word)
    else:
        held_out = paths_by_word["test"] or paths_by_word["val"]
    training = (
        find_paths_of_split(location, paths, train_split_name, paths_by_word)
        if train_split_name
        else paths_by_word["train"]
    )
    held_out_set = set(held_out)
    training = [path for path in training if path not in held_out_set]
    used = held_out_set.union(training)
    strays = [path for path in paths_by_word[None] if path not in used]
    if strays and (train_split_name is None or test_split_name is None):
        raise InputError(
            f"{location} holds files of no known split: {format_names(strays)}; known are the words "
            f"{SPLIT_WORDS_HELP}: rename them, {hint}"
        )
    if not training:
        raise InputError(f"no training file in {location} (found: {format_names(list(paths))}): {hint}")
    unused_val: list[str] = []
    if test_split_name is None and paths_by_word["test"]:
        unused_val = [path for path in paths_by_word["val"] if path not in used]
    notes: tuple[str, ...] = ()
    if unused_val:
        notes = (f"held out is test, not val ({format_names(unused_val, 2)}); ?test=val chooses it",)
    no_held_out_reason = (
        "" if held_out else f"{location} has training files only ({SPLIT_WORDS_HELP}): {hint}"
    )
    return _SplitPaths(training, held_out, notes, no_held_out_reason, tuple(unused_val))


def find_paths_of_split(
    location: str, paths: Sequence[str], split_name: str, paths_by_split: Mapping[str | None, list[str]]
) -> list[str]:
    """Return the paths that hold a name as a word, or else those of the split that the name means.

    Raises
    ------
    InputError
        If there are none.
    """
    pattern = re.compile(rf"(?<![a-z0-9]){re.escape(split_name.lower())}(?![a-z0-9])")
    matches = [path for path in paths if pattern.search(path.lower())]
    if not matches and (word := find_split_named_in_path(split_name)) is not None:
        matches = paths_by_split[word]
    if not matches:
        raise InputError(
            f"no file in {location} is of a split {split_name}: there are {format_names(list(paths))}"
        )
    return matches


def require_one_dataset(location: str, train_paths: Sequence[str], test_paths: Sequence[str]) -> None:
    """Refuse a folder that holds several datasets, such as the configurations of one on the Hub.

    They are several if two folders hold both splits each, or files of the same name. Shards that are merely
    spread over folders are one dataset.

    Raises
    ------
    InputError
        Lists the folders.
    """
    splits_by_folder: dict[str, set[str]] = {}
    folders_by_name: dict[str, set[str]] = {}
    for split, paths in (("train", train_paths), ("test", test_paths)):
        for path in paths:
            folder, rest = cut_path_before_split_part(path)
            splits_by_folder.setdefault(folder, set()).add(split)
            folders_by_name.setdefault(f"{split}/{_PART_COUNT.sub('', rest)}", set()).add(folder)
    complete = {folder for folder, splits in splits_by_folder.items() if len(splits) == 2}
    same_named = set().union(*(folders for folders in folders_by_name.values() if len(folders) > 1))
    folders = sorted(same_named | (complete if len(complete) > 1 else set()))
    if folders:
        raise InputError(
            f"{location} holds several datasets, in {format_names([folder or '.' for folder in folders])}: "
            f"choose one, such as {location.rstrip('/')}/{next(filter(None, folders))}, or name the files: "
            f"PATTERN?test=PATTERN"
        )


def cut_path_before_split_part(path: str) -> tuple[str, str]:
    """Split a path before the first part that names a split: ``full/train/0.tar`` after ``full``."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if find_split_named_in_path(part)), len(parts) - 1)
    return "/".join(parts[:first]), "/".join(parts[first:])
