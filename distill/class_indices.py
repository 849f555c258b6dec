"""Select some of a store's classes, by a file or a list that names them."""

import difflib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.stats_store.cards import DatasetCard
from sfm.stats_store.class_lists import ParsedClassList, find_class_id, normalize_class_id, read_class_file


def find_class_indices(
    class_file_or_names: Path | tuple[str, ...] | None, card: DatasetCard
) -> npt.NDArray[np.int64]:
    """Return the indices of the classes that a file or a list names, in the entry's order.

    Parameters
    ----------
    class_file_or_names : Path, tuple of str, or None
        A class list (see :func:`~sfm.stats_store.class_lists.parse_class_list`) whose ids may also be
        display names, or such names. None means all classes.
    card : DatasetCard

    Returns
    -------
    ndarray of int64, shape (C,)

    Raises
    ------
    InputError
        If the file cannot be read, or a name is unknown, ambiguous or repeated.
    """
    if class_file_or_names is None:
        return np.arange(len(card.class_ids))
    if isinstance(class_file_or_names, tuple):
        class_list = ParsedClassList("`classes` of the configuration", list(class_file_or_names), {})
    else:
        class_list = read_class_file(expand_home(class_file_or_names))
    indices: list[int] = []
    for name in class_list.class_ids:
        index = _find_class_index(name, card, class_list.origin)
        if index in indices:
            raise InputError(f"{class_list.origin} names '{name}' again: name every class once")
        indices.append(index)
    return np.sort(np.array(indices, dtype=np.int64))


def _find_class_index(name: str, card: DatasetCard, origin: str) -> int:
    class_id = find_class_id(name, card.class_ids)
    if class_id is not None:
        return card.class_ids.index(class_id)
    matches = [index for index, display in enumerate(card.class_names) if normalize_class_id(display) == name]
    if not matches:
        close = difflib.get_close_matches(name, [*card.class_ids, *card.class_names], n=3)
        hint = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
        if " #" in name:
            hint += "; '#' begins a comment only at the beginning of a line"
        raise InputError(f"{origin}: {card.name} has no class '{name}'{hint}")
    if len(matches) > 1:
        ids = ", ".join(card.class_ids[index] for index in matches)
        raise InputError(f"{origin}: {card.name} has several classes named '{name}': use an id ({ids})")
    return matches[0]
