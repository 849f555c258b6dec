"""Class ids: what label numbers mean, which classes are kept, and what people call them."""

import difflib
import importlib.resources
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from sfm.errors import InputError
from sfm.paths import expand_home

WORDNET = re.compile(r"n\d{8}")
DIGITS = 5
ALIASES = {
    "imagefruit": "imagenet-fruits",
    "imagemeow": "imagenet-cats",
    "imagesquawk": "imagenet-birds",
}
"""Names by which earlier papers know the same ten classes."""


@dataclass(frozen=True)
class ClassList:
    """A list of classes.

    Attributes
    ----------
    origin : str
        The file or the name it was read from.
    ids : list of str
        In the order of the list.
    names : dict of str to str
        Display names, of those that the list names.
    """

    origin: str
    ids: list[str]
    names: dict[str, str]


def shipped_lists() -> list[str]:
    """Return the names of the class lists that come with this package."""
    folder = importlib.resources.files("sfm.pipeline") / "data" / "classes"
    return sorted(
        entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt")
    )


def read_class_list(text: str) -> ClassList:
    """Read a list of classes.

    Parameters
    ----------
    text : str
        Name of a shipped list, or path of a file with one class id per line; a display name may follow a
        tab, ``#`` begins a comment line.

    Raises
    ------
    InputError
        If there is no such list, it is empty, or a class occurs twice.
    """
    name = ALIASES.get(text, text)
    if name in shipped_lists():
        content = (importlib.resources.files("sfm.pipeline") / "data" / "classes" / f"{name}.txt").read_text(
            encoding="utf-8"
        )
    else:
        path = expand_home(text)
        if not path.is_file():
            known = [*shipped_lists(), *ALIASES]
            close = difflib.get_close_matches(text, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"shipped lists: {', '.join(known)}"
            raise InputError(f"no class list {text}: it is neither a file nor a list by that name; {hint}")
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not a class list: it is not UTF-8 text") from error
    ids: list[str] = []
    names: dict[str, str] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        class_id, _, shown = (part.strip() for part in line.partition("\t"))
        if class_id in ids:
            raise InputError(f"line {number} of class list {text} repeats the class {class_id}")
        ids.append(class_id)
        if shown:
            names[class_id] = shown
    if not ids:
        raise InputError(f"class list {text} holds no class")
    return ClassList(text, ids, names)


def number_id(label: int) -> str:
    """Return the class id of a label number without a name; padded, so that ids sort as numbers do."""
    return str(label).zfill(DIGITS)


def label_id(label: object, names: ClassList | None, where: str) -> str:
    """Return the class id that a stored label means.

    Parameters
    ----------
    label : object
        An integer, or text: a number or a class id.
    names : ClassList or None
        What the numbers 0, 1, … mean; without it a number is its own id.
    where : str
        Names the sample.

    Raises
    ------
    InputError
        If the label is missing, out of range or unknown; names the sample.
    """
    if isinstance(label, str) and re.fullmatch(r"\s*-?\d+\s*", label):
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise InputError(f"{where} has no usable label: found {label!r}, expected a number or a class id")
    if isinstance(label, int):
        if label < 0:
            raise InputError(
                f"{where} has label {label}, which marks unlabelled images: choose another split"
            )
        if names is None:
            return number_id(label)
        if label >= len(names.ids):
            raise InputError(
                f"{where} has label {label}, out of range: {names.origin} names {len(names.ids)} classes, "
                f"0 to {len(names.ids) - 1}"
            )
        return names.ids[label]
    label = label.strip()
    if names is not None and label not in names.ids:
        close = difflib.get_close_matches(label, names.ids, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{where} has label {label!r}, which {names.origin} does not name{hint}")
    return label


def normalised(class_id: str) -> str:
    """Return a class id as a person reads it: case, surrounding blanks and Unicode variants are the same."""
    return " ".join(unicodedata.normalize("NFKC", class_id).casefold().split())


def display_names(class_ids: Sequence[str]) -> list[str]:
    """Return what people call classes: WordNet ids get their first lemma, others stay as they are."""
    if not all(WORDNET.fullmatch(class_id) for class_id in class_ids):
        return list(class_ids)
    from timm.data.imagenet_info import ImageNetInfo

    lemmas: dict[str, str] = {}
    # The thousand classes are not all among the larger set.
    for subset in ("imagenet-22k", "imagenet-1k"):
        lemmas |= cast("dict[str, str]", ImageNetInfo(subset).label_descriptions(as_dict=True))
    return [lemmas.get(class_id, class_id).partition(",")[0] for class_id in class_ids]
