"""Class ids: what label numbers mean, which classes are kept, and what people call them."""

import difflib
import importlib.resources
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.limits import require_listable, require_short_name
from sfm.stats_store.class_lists import (
    ClassList,
    normalize_class_id,
    find_class_id,
    parse_class_list,
    read_class_file,
)
from sfm.text import one_line

__all__ = ["ClassList", "display_names", "label_id", "read_class_list", "shipped_lists"]

WORDNET = re.compile(r"n\d{8}")
DIGITS = 5
NUMBER = re.compile(r"-?\d{1,18}")
LARGEST = 2**63 - 1
ALIASES = {
    "imagefruit": "imagenet-fruits",
    "imagemeow": "imagenet-cats",
    "imagesquawk": "imagenet-birds",
}
"""Names by which earlier papers know the same ten classes."""


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
        shipped = importlib.resources.files("sfm.pipeline") / "data" / "classes" / f"{name}.txt"
        return parse_class_list(shipped.read_text(encoding="utf-8"), text)
    path = expand_home(text)
    if not path.is_file():
        known = [*shipped_lists(), *ALIASES]
        close = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"shipped lists: {', '.join(known)}"
        raise InputError(f"no class list {text}: it is neither a file nor a list by that name; {hint}")
    found = replace(read_class_file(path), origin=text)
    require_listable(found.ids, list(found.names.values()), f"the class list {text}")
    return found


def number_id(label: int) -> str:
    """Return the class id of a label number without a name; padded, so that ids sort as numbers do."""
    return str(label).zfill(DIGITS)


def label_id(label: object, names: ClassList | None, where: str) -> str:
    """Return the class id that a stored label means.

    Text that is a class id of the list is that class, digits or not. Other text of digits is a number.

    Parameters
    ----------
    label : object
        An integer, or text: a class id or a number.
    names : ClassList or None
        What the numbers 0, 1, … mean; without it a number is its own id.
    where : str
        Names the sample.

    Raises
    ------
    InputError
        If the label is missing, out of range or unknown; names the sample.
    """
    if isinstance(label, str):
        label = normalize_class_id(require_short_name(label.strip(), where))
        if names is not None and label in names.ids:
            return label
        if NUMBER.fullmatch(label):
            label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        shown = one_line(repr(label), 40)
        raise InputError(f"{where} has no usable label: found {shown}, expected a number or a class id")
    if isinstance(label, int):
        if abs(label) > LARGEST:
            raise InputError(f"{where} has a label beyond {LARGEST}: it is damaged")
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
    if names is None:
        return label
    found = find_class_id(label, names.ids)
    if found is None:
        close = difflib.get_close_matches(label, names.ids, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{where} has label {label!r}, which {names.origin} does not name{hint}")
    return found


def written_number(label: object) -> str:
    """Return how a label that is a number, or may be read as one, is written; "" for any other label."""
    if isinstance(label, str) and NUMBER.fullmatch(label.strip()):
        return label.strip()
    return str(label) if isinstance(label, int) else ""


def meaning_of(names: ClassList | None) -> str:
    """Return what a split's listing holds of the list that its label numbers are read with.

    Where ids are digits, text labels used to be taken for positions: what was extracted so is not the same.
    """
    if names is None:
        return ""
    return "\n".join(names.ids) + ("\ntext is an id" if any(map(NUMBER.fullmatch, names.ids)) else "")


def require_one_writing(spec: str, written: Iterable[tuple[str, str]]) -> None:
    """Refuse labels that are written differently but would be one class, such as 1 and 01.

    They may be two classes, or an id and a position in a list; no one but the user can tell.

    Parameters
    ----------
    spec : str
        What the user wrote.
    written : iterable of (str, str)
        Class id, and how its label is written (see :func:`written_number`).

    Raises
    ------
    InputError
        Names the class and two ways in which it is written.
    """
    first: dict[str, str] = {}
    for class_id, text in written:
        if text and first.setdefault(class_id, text) != text:
            raise InputError(
                f"{spec} writes labels of class {class_id} as {first[class_id]!r} and as {text!r}: write "
                f"every class in one way (text that is an id in names= is that class; other digits count)"
            )


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
