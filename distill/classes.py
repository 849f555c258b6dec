"""Some of a store's classes, by a file that names them."""

import difflib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.stats_store.cards import DatasetCard
from sfm.stats_store.class_lists import ClassList, find_class_id, normalize_class_id, read_class_file


def chosen_classes(file: Path | None, card: DatasetCard) -> npt.NDArray[np.int64]:
    """Return the places of the classes that a file names, in the entry's order.

    Parameters
    ----------
    file : Path or None
        A class list (see :func:`~sfm.stats_store.class_lists.parse_class_list`) whose ids may also be
        display names. None means all classes.
    card : DatasetCard

    Returns
    -------
    ndarray of int64, shape (C,)

    Raises
    ------
    InputError
        If the file cannot be read, or names a class that is not there, one that several share, or one twice.
    """
    if file is None:
        return np.arange(len(card.class_ids))
    return places_of(read_class_file(expand_home(file)), card)


def places_of(chosen: ClassList, card: DatasetCard) -> npt.NDArray[np.int64]:
    """Return the places of the classes that a list names; see :func:`chosen_classes`."""
    places: list[int] = []
    for text in chosen.ids:
        place = _place(text, card, chosen.origin)
        if place in places:
            raise InputError(f"{chosen.origin} names '{text}' again: name every class once")
        places.append(place)
    return np.sort(np.array(places, dtype=np.int64))


def _place(text: str, card: DatasetCard, where: str) -> int:
    found = find_class_id(text, card.class_ids)
    if found is not None:
        return card.class_ids.index(found)
    named = [place for place, name in enumerate(card.class_names) if normalize_class_id(name) == text]
    if not named:
        close = difflib.get_close_matches(text, [*card.class_ids, *card.class_names], n=3)
        guess = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
        if " #" in text:
            guess += "; '#' begins a comment only at the beginning of a line"
        raise InputError(f"{where}: {card.name} has no class '{text}'{guess}")
    if len(named) > 1:
        ids = ", ".join(card.class_ids[place] for place in named)
        raise InputError(f"{where}: {card.name} has several classes named '{text}': use an id ({ids})")
    return named[0]
