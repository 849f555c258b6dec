"""Match the class labels of images of another program to the classes of an entry."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sfm.errors import InputError
from sfm.stats_store.class_lists import find_class_id, normalize_class_id
from sfm.text import sanitize_line

MAX_LISTED = 8
"""Labels or classes that a message lists."""

FindClass = Callable[[str], int | None]
"""Returns the index of the class that a label names; None if it names none."""


@dataclass(frozen=True)
class MatchedClasses:
    """Which class every label is.

    Attributes
    ----------
    index_by_label : dict of str to int
        Index of the class in the entry.
    note : str
        How labels were read, where they are not the classes' ids; "" otherwise.
    """

    index_by_label: dict[str, int]
    note: str = ""


def match_class_labels(
    labels: Sequence[str], class_ids: Sequence[str], class_names: Sequence[str], location: str, dataset: str
) -> MatchedClasses:
    """Find the class of every distinct label, all in one way.

    Labels are class ids; or else display names; or else numbers, also with a name behind them as in
    ``3_dress``: positions in the order of the classes. Numbers must be all of 0, 1, ... up to the last class,
    since nothing else shows that they are positions in the same list.

    Parameters
    ----------
    labels : sequence of str
        Distinct, as they are written where the images were read.
    class_ids, class_names : sequence of str
        Of the entry, in its order.
    location, dataset : str
        Of the images and of the entry, for messages.

    Raises
    ------
    InputError
        If not all labels are classes in one of these ways; lists those that are not, and the classes without
        images.
    """
    position_by_name = {normalize_class_id(name): i for i, name in enumerate(class_names)}
    names_are_unique = len(position_by_name) == len(class_names)
    position_by_id = {class_id: i for i, class_id in enumerate(class_ids)}
    position_by_number = {int(id_): i for i, id_ in enumerate(class_ids) if re.fullmatch(r"\d{1,18}", id_)}
    ids_are_numbers = len(position_by_number) == len(class_ids)

    def find_by_id(label: str) -> int | None:
        class_id = find_class_id(label, class_ids)
        if class_id is None and ids_are_numbers and re.fullmatch(r"\d{1,18}", label):
            return position_by_number.get(int(label))
        return None if class_id is None else position_by_id[class_id]

    def find_by_name(label: str) -> int | None:
        return position_by_name.get(normalize_class_id(label)) if names_are_unique else None

    positions = find_positions(labels, len(class_ids))
    ways: list[tuple[FindClass, str]] = [
        (find_by_id, ""),
        (find_by_name, "Labels were taken as the display names of classes."),
        (positions.get, describe_positions(positions, class_names)),
    ]
    matched = []
    for find, note in ways:
        found = {label: find(label) for label in labels}
        indices = {label: index for label, index in found.items() if index is not None}
        if len(indices) == len(labels) == len(set(indices.values())):
            return MatchedClasses(indices, note)
        matched.append(indices)
    best = max(matched, key=len)
    unknown = [label for label in labels if label not in best]
    missing = [class_ids[i] for i in range(len(class_ids)) if i not in best.values()]
    parts = []
    if unknown:
        parts.append(
            f"{format_count(len(unknown), 'is no class', 'are no classes')} there: {list_texts(unknown)}"
        )
    else:
        parts.append("several labels are the same class")
    if missing:
        parts.append(
            f"{format_count(len(missing), 'class has', 'classes have')} no image: {list_texts(missing)}"
        )
    raise InputError(f"the labels of {location} are not the classes of {dataset}: {'; '.join(parts)}")


def find_positions(labels: Sequence[str], class_count: int) -> dict[str, int]:
    """Return the number that every label begins with; nothing unless they are all of 0 to the last class."""
    matches = [re.fullmatch(r"(\d{1,9})(_.*)?", label, re.ASCII | re.DOTALL) for label in labels]
    positions = {label: int(match[1]) for label, match in zip(labels, matches, strict=True) if match}
    if sorted(positions.values()) != list(range(class_count)) or len(positions) != len(labels):
        return {}
    return positions


def describe_positions(position_by_label: dict[str, int], class_names: Sequence[str]) -> str:
    """Return a sentence about labels that are positions, with the first two."""
    first = sorted(position_by_label, key=position_by_label.__getitem__)[:2]
    pairs = ", ".join(
        f"{sanitize_line(label, 40)} is {sanitize_line(class_names[position_by_label[label]], 40)}"
        for label in first
    )
    return f"Labels were taken as positions in the dataset's list of classes: {pairs}, ..."


def format_count(count: int, singular_end: str, plural_end: str) -> str:
    """Return a count with what follows it in singular or plural."""
    return f"{count:,} {singular_end if count == 1 else plural_end}"


def list_texts(texts: Sequence[str]) -> str:
    """Return the first texts on one line, and how many more there are."""
    listed = ", ".join(sanitize_line(text, 60) for text in texts[:MAX_LISTED])
    return listed + (f" and {len(texts) - MAX_LISTED:,} more" if len(texts) > MAX_LISTED else "")
