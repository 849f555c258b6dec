"""Some of a store's classes, by a file that names them."""

import difflib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.stats_store.cards import DatasetCard


def chosen_classes(file: Path | None, card: DatasetCard) -> npt.NDArray[np.int64]:
    """Return the places of the classes that a file names, in the entry's order.

    Parameters
    ----------
    file : Path or None
        One class id or display name per line; empty lines and what follows a ``#`` do not count. None means
        all classes.
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
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --classes {file}: {error}") from error
    chosen: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            place = _place(text, card, f"line {number} of {file}")
            if place in chosen:
                raise InputError(f"line {number} of {file} names '{text}' again: name every class once")
            chosen.append(place)
    return np.sort(np.array(chosen, dtype=np.int64))


def _place(text: str, card: DatasetCard, where: str) -> int:
    if text in card.class_ids:
        return card.class_ids.index(text)
    named = [place for place, name in enumerate(card.class_names) if name == text]
    if not named:
        close = difflib.get_close_matches(text, [*card.class_ids, *card.class_names], n=3)
        guess = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
        raise InputError(f"{where}: {card.name} has no class '{text}'{guess}")
    if len(named) > 1:
        ids = ", ".join(card.class_ids[place] for place in named)
        raise InputError(f"{where}: {card.name} has several classes named '{text}': use an id ({ids})")
    return named[0]
