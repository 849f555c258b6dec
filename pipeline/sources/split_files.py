"""Which files of a dataset are for training and which are held out, by the words in their paths.

The words are those by which the ``datasets`` library tells splits apart, in any capitals, the same for every
kind of source.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import (
    DataFile,
    find_files,
    is_remote_url,
    list_files,
    resolve_local_path,
)
from sfm.pipeline.sources.inventory import Inventory, could_be_folder, get_unused_kind
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
_IN_TWO = re.compile(r"h(?:eld|old)[-_ ]out")
_PARTS = re.compile(r"-of-\d+")


@dataclass(frozen=True)
class SplitFiles:
    """The files of both splits of a dataset.

    Attributes
    ----------
    train, test : list of DataFile
        None held out if there are none; the inventory says then what was looked for.
    inventory : Inventory
    val : list of DataFile
        What could be held out in place of `test`, where nobody chose.
    found_as : str
        The split that words in their paths say `test` is: test or val; empty where the user chose.
    """

    train: list[DataFile]
    test: list[DataFile]
    inventory: Inventory
    val: list[DataFile] = field(default_factory=list)
    found_as: str = ""

    def labelled(self, has_labels: Callable[[DataFile], bool]) -> "SplitFiles":
        """Return the files with ``val`` held out if ``test`` has no labels, as that of a competition.

        Without a ``val`` that has labels nothing is held out. What the user chose is left as it is.
        """
        if not self.found_as or any(map(has_labels, self.test)):
            return self
        name = posixpath.basename(self.test[0].url)
        if self.val:
            note = f"held out is val: {self.found_as} has no labels ({name})"
            unused = Counter(self.inventory.unused) - Counter({"of val": len(self.val)})
            chosen = SplitFiles(self.train, self.val, Inventory(dict(unused), (note,)), found_as="val")
            chosen = chosen.labelled(has_labels)
        else:
            note = f"{self.found_as} is not used: it has no labels ({name})"
            why = f"there is no held-out split to use: {self.found_as} has no labels ({name})"
            chosen = SplitFiles(self.train, [], Inventory(self.inventory.unused, (note,), why))
        inventory = chosen.inventory.with_unused(f"of {self.found_as}", len(self.test))
        return replace(chosen, inventory=inventory)


def find_split_word(path: str) -> str | None:
    """Return the split that a path names: train, test or val, or None."""
    text = _IN_TWO.sub("heldout", path.lower())
    return next((SPLIT_WORDS[word] for word in _WORD.findall(text) if word in SPLIT_WORDS), None)


def find_split_files(
    place: str, suffixes: tuple[str, ...], train: str | None = None, test: str | None = None
) -> SplitFiles:
    """Find the files of both splits of a dataset.

    Parameters
    ----------
    place : str
        A folder, prefix or pattern that holds both splits, told apart by words in their paths; or a pattern
        of training files.
    suffixes : tuple of str
        What the names of files in a folder end in.
    train, test : str, optional
        Of a folder or prefix: the names of the splits to take. Beside a pattern of training files `test` is
        a pattern of held-out files; one without a slash means files beside the training files.

    Raises
    ------
    InputError
        If nothing is found, the splits cannot be told apart, files are of no split that is known, or the
        folder holds several datasets.
    """
    is_pattern = any(sign in place for sign in "{*") or place.endswith(suffixes)
    if is_pattern and train is not None:
        raise InputError(f"{place} names files: ?train= chooses among those of a folder; leave it out")
    if is_pattern and test is not None:
        beside = test if "/" in test else posixpath.join(posixpath.dirname(place), test)
        return SplitFiles(find_files(place), find_files(beside), Inventory())
    if test is not None and (any(sign in test for sign in "{*/") or test.endswith(suffixes)):
        raise InputError(
            f"{place} is a folder: ?test= takes the name of a split in it, such as val; name the training "
            f"files, too, to use a pattern: {place.rstrip('/')}/train-*{suffixes[0]}?test={test}"
        )
    unused: Counter[str] = Counter()
    if is_pattern:
        root, files = posixpath.dirname(re.split(r"[{*]", place)[0]), find_files(place)
    else:
        root = place.rstrip("/") or "/"
        files = list_data_files(root, suffixes, unused)
    base = root if is_remote_url(root) else str(resolve_local_path(root))
    paths = {file.url.removeprefix(base).lstrip("/"): file for file in files}
    chosen = choose_splits(place, list(paths), train, test)
    if not is_pattern:
        require_one_dataset(place, chosen.train, chosen.test)
    for path in set(paths) - {*chosen.train, *chosen.test}:
        unused[f"of {find_split_word(path) or 'other splits'}"] += 1
    return SplitFiles(
        [paths[path] for path in chosen.train],
        [paths[path] for path in chosen.test],
        Inventory(dict(unused), chosen.notes, chosen.no_held_out),
        [paths[path] for path in chosen.val],
        find_split_word(chosen.test[0]) or "" if chosen.test and test is None else "",
    )


def list_data_files(root: str, suffixes: tuple[str, ...], unused: Counter[str]) -> list[DataFile]:
    """List the files of a folder or prefix that end in one of some suffixes, and count the others.

    Raises
    ------
    InputError
        If there is none, or a link that may be one leads nowhere.
    """

    def matters(path: str) -> bool:
        return path.endswith(suffixes) or could_be_folder(path)

    listed = list_files(root, unused, matters)
    files = [file for file in listed if file.url.endswith(suffixes)]
    unused.update(get_unused_kind(file.url) for file in listed if not file.url.endswith(suffixes))
    if not files:
        raise InputError(f"no file that ends in {suffixes[0]} under {root}")
    return files


@dataclass(frozen=True)
class _SplitChoice:
    train: list[str]
    test: list[str]
    notes: tuple[str, ...] = ()
    no_held_out: str = ""
    val: tuple[str, ...] = ()


def choose_splits(place: str, paths: Sequence[str], train: str | None, test: str | None) -> _SplitChoice:
    """Tell training from held-out files by their paths below the dataset's folder.

    Raises
    ------
    InputError
        If there is no training file, or a file is of no split that is known.
    """
    by_word: dict[str | None, list[str]] = {"train": [], "test": [], "val": [], None: []}
    for path in paths:
        by_word[find_split_word(path)].append(path)
    hint = "choose with ?train=NAME&test=NAME, or write PATTERN?test=PATTERN"
    if train is None and test is None and len(by_word[None]) == len(paths):
        return _SplitChoice(
            list(paths),
            [],
            no_held_out=f"cannot tell training from held-out files in {place} by words in their names "
            f"({SPLIT_WORDS_HELP}): {hint}",
        )
    held_out = match_split_name(place, paths, test, by_word) if test else by_word["test"] or by_word["val"]
    training = match_split_name(place, paths, train, by_word) if train else by_word["train"]
    out = set(held_out)
    training = [path for path in training if path not in out]
    used = out.union(training)
    strays = [path for path in by_word[None] if path not in used]
    if strays and (train is None or test is None):
        raise InputError(
            f"{place} holds files of no split that is known: {format_names(strays)}; known are the words "
            f"{SPLIT_WORDS_HELP}: rename them, {hint}"
        )
    if not training:
        raise InputError(f"no training file in {place} (found: {format_names(list(paths))}): {hint}")
    notes: list[str] = []
    passed = []
    if test is None and by_word["test"]:
        passed = [path for path in by_word["val"] if path not in used]
    if passed:
        notes.append(f"held out is test, not val ({format_names(passed, 2)}); ?test=val chooses it")
    no_held_out = "" if held_out else f"{place} has training files only ({SPLIT_WORDS_HELP}): {hint}"
    return _SplitChoice(training, held_out, tuple(notes), no_held_out, tuple(passed))


def match_split_name(
    place: str, paths: Sequence[str], name: str, by_word: Mapping[str | None, list[str]]
) -> list[str]:
    """Return the paths that hold a name as a word, or else those of the split that the name means.

    Raises
    ------
    InputError
        If there are none.
    """
    holds = make_word_matcher(name)
    found = [path for path in paths if holds(path)] or by_word.get(find_split_word(name), [])
    if not found or (find_split_word(name) is None and not any(holds(path) for path in paths)):
        raise InputError(f"no file in {place} is of a split {name}: there are {format_names(list(paths))}")
    return found


def make_word_matcher(name: str) -> Callable[[str], bool]:
    """Return a function that says whether a path holds a name that no letter or digit adjoins."""
    pattern = re.compile(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])")
    return lambda path: pattern.search(path.lower()) is not None


def require_one_dataset(place: str, train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse a folder that holds several datasets, such as the configurations of one on the Hub.

    They are taken for several if two of their folders hold both splits, or files that are called the same.
    Shards that are merely spread over folders are one dataset.

    Raises
    ------
    InputError
        Lists the folders.
    """
    splits: dict[str, set[str]] = {}
    owners: dict[str, set[str]] = {}
    for split, paths in (("train", train), ("test", test)):
        for path in paths:
            folder, rest = separate_dataset_folder(path)
            splits.setdefault(folder, set()).add(split)
            owners.setdefault(f"{split}/{_PARTS.sub('', rest)}", set()).add(folder)
    whole = {folder for folder, held in splits.items() if len(held) == 2}
    alike = set().union(*(folders for folders in owners.values() if len(folders) > 1))
    several = sorted(alike | (whole if len(whole) > 1 else set()))
    if several:
        root = place.rstrip("/")
        raise InputError(
            f"{place} holds several datasets, in {format_names([folder or '.' for folder in several])}: "
            f"choose one, such as {root}/{next(filter(None, several))}, or name the files: "
            f"PATTERN?test=PATTERN"
        )


def separate_dataset_folder(path: str) -> tuple[str, str]:
    """Split a path before the first part that names a split: ``full/train/0.tar`` is of ``full``."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if find_split_word(part)), len(parts) - 1)
    return "/".join(parts[:first]), "/".join(parts[first:])
