"""Class lists, conversion of stored labels to class ids, and display names of classes."""

import difflib
import importlib.resources
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.limits import require_class_names_within_limits, require_short_class_name
from sfm.stats_store.class_lists import (
    ParsedClassList,
    find_class_id,
    normalize_class_id,
    parse_class_list,
    read_class_file,
)
from sfm.text import sanitize_line

__all__ = [
    "ParsedClassList",
    "class_id_from_label",
    "get_wordnet_names_or_ids",
    "list_shipped_class_lists",
    "read_class_list",
]

WORDNET_ID = re.compile(r"n\d{8}")
NUMBER_ID_DIGITS = 5
LABEL_NUMBER = re.compile(r"-?\d{1,18}")
MAX_LABEL = 2**63 - 1
LIST_ALIASES = {
    "imagefruit": "imagenet-fruits",
    "imagemeow": "imagenet-cats",
    "imagesquawk": "imagenet-birds",
}
"""Names of shipped lists in earlier papers."""


def list_shipped_class_lists() -> list[str]:
    """Return the names of the class lists that come with this package."""
    folder = importlib.resources.files("sfm.pipeline") / "data" / "classes"
    return sorted(
        entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt")
    )


def read_class_list(name_or_path: str) -> ParsedClassList:
    """Read a list of classes.

    Parameters
    ----------
    name_or_path : str
        Name of a shipped list, or path of a file with one class id per line; a display name may follow a
        tab, ``#`` begins a comment line.

    Raises
    ------
    InputError
        If there is no such list, it is empty, or a class occurs twice.
    """
    name = LIST_ALIASES.get(name_or_path, name_or_path)
    if name in list_shipped_class_lists():
        shipped = importlib.resources.files("sfm.pipeline") / "data" / "classes" / f"{name}.txt"
        return parse_class_list(shipped.read_text(encoding="utf-8"), name_or_path)
    path = expand_home(name_or_path)
    if not path.is_file():
        known = [*list_shipped_class_lists(), *LIST_ALIASES]
        close = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"shipped lists: {', '.join(known)}"
        raise InputError(
            f"no class list {name_or_path}: it is neither a file nor a list by that name; {hint}"
        )
    class_list = replace(read_class_file(path), origin=name_or_path)
    display_names = list(class_list.display_names.values())
    require_class_names_within_limits(class_list.class_ids, display_names, f"the class list {name_or_path}")
    return class_list


def make_zero_padded_class_id(label_number: int) -> str:
    """Return the class id of a label number without a name; padded with zeros, so ids sort as numbers."""
    return str(label_number).zfill(NUMBER_ID_DIGITS)


def class_id_from_label(stored_label: object, class_list: ParsedClassList | None, location: str) -> str:
    """Convert a stored label to a class id.

    Text that is a class id of the list is that class, digits or not. Other text of digits is a number.

    Parameters
    ----------
    stored_label : object
        An integer, or text: a class id or a number.
    class_list : ParsedClassList or None
        Classes of the numbers 0, 1, …; without it a number is its own id.
    location : str
        Location of the sample, for messages.

    Raises
    ------
    InputError
        If the label is missing, out of range or unknown; names the sample.
    """
    if isinstance(stored_label, str):
        stored_label = normalize_class_id(require_short_class_name(stored_label.strip(), location))
        if class_list is not None and stored_label in class_list.class_ids:
            return stored_label
        if LABEL_NUMBER.fullmatch(stored_label):
            stored_label = int(stored_label)
    if isinstance(stored_label, bool) or not isinstance(stored_label, int | str) or stored_label == "":
        shown = sanitize_line(repr(stored_label), 40)
        raise InputError(f"{location} has no usable label: found {shown}, expected a number or a class id")
    if isinstance(stored_label, int):
        if abs(stored_label) > MAX_LABEL:
            raise InputError(f"{location} has a label beyond {MAX_LABEL}: it is damaged")
        if stored_label < 0:
            raise InputError(
                f"{location} has label {stored_label}, which marks unlabelled images: choose another split"
            )
        if class_list is None:
            return make_zero_padded_class_id(stored_label)
        if stored_label >= len(class_list.class_ids):
            raise InputError(
                f"{location} has label {stored_label}, out of range: {class_list.origin} names "
                f"{len(class_list.class_ids)} classes, 0 to {len(class_list.class_ids) - 1}"
            )
        return class_list.class_ids[stored_label]
    if class_list is None:
        return stored_label
    class_id = find_class_id(stored_label, class_list.class_ids)
    if class_id is None:
        close = difflib.get_close_matches(stored_label, class_list.class_ids, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"{location} has label {stored_label!r}, which {class_list.origin} does not name{hint}"
        )
    return class_id


def format_numeric_label_or_empty(stored_label: object) -> str:
    """Return the text of a label that is a number, or text of digits; "" for any other label."""
    if isinstance(stored_label, str) and LABEL_NUMBER.fullmatch(stored_label.strip()):
        return stored_label.strip()
    return str(stored_label) if isinstance(stored_label, int) else ""


def format_class_list_for_digest(class_list: ParsedClassList | None) -> str:
    """Encode a class list of label numbers for the listing of a split.

    If ids are digits, earlier versions read text labels as positions, so their entries differ.
    """
    if class_list is None:
        return ""
    suffix = "\ntext is an id" if any(map(LABEL_NUMBER.fullmatch, class_list.class_ids)) else ""
    return "\n".join(class_list.class_ids) + suffix


def require_one_spelling_per_class(spec: str, class_ids_and_label_texts: Iterable[tuple[str, str]]) -> None:
    """Refuse labels that are spelled differently but would be one class, such as 1 and 01.

    They may be two classes, or an id and a position in a list, which is ambiguous.

    Parameters
    ----------
    spec : str
        Dataset spec, for messages.
    class_ids_and_label_texts : iterable of (str, str)
        Class ids and the texts of their labels (see :func:`format_numeric_label_or_empty`).

    Raises
    ------
    InputError
        Names the class and two of its spellings.
    """
    first_texts: dict[str, str] = {}
    for class_id, text in class_ids_and_label_texts:
        if text and first_texts.setdefault(class_id, text) != text:
            raise InputError(
                f"{spec} writes labels of class {class_id} as {first_texts[class_id]!r} and as {text!r}: "
                f"write every class in one way (text that is an id in names= is that class; other digits "
                f"count)"
            )


def normalize_name_for_comparison(name: str) -> str:
    """Return a class name without differences in case, blanks and Unicode variants, to compare names."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def get_wordnet_names_or_ids(class_ids: Sequence[str]) -> list[str]:
    """Return display names of classes: the first lemma of WordNet ids; other ids stay as they are."""
    if not all(WORDNET_ID.fullmatch(class_id) for class_id in class_ids):
        return list(class_ids)
    from timm.data.imagenet_info import ImageNetInfo

    lemmas: dict[str, str] = {}
    # Not all of the thousand classes are in the larger set.
    for subset in ("imagenet-22k", "imagenet-1k"):
        lemmas |= cast("dict[str, str]", ImageNetInfo(subset).label_descriptions(as_dict=True))
    return [lemmas.get(class_id, class_id).partition(",")[0] for class_id in class_ids]
