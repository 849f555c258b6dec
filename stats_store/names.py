"""Names of datasets: what one may be, what a source's own becomes, and how ``NAME@DIGEST`` is read."""

import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

from sfm.constrained_types import MAX_NAME_LENGTH
from sfm.text import escape_non_utf8, is_displayable


def problem_with_name(name: str) -> str | None:
    """Return why a dataset cannot have a name; None if it can."""
    if "@" in name or name.strip() != name or not name:
        return "must not contain @ or begin or end with a blank"
    if len(name) > MAX_NAME_LENGTH:
        return f"must not be longer than {MAX_NAME_LENGTH} characters"
    if not all(map(is_displayable, name)):
        return "must be one line without control characters"
    return None


def name_from(text: str) -> str:
    """Return the name that a dataset gets from its folder's name: what a name cannot hold becomes a dash.

    Examples
    --------
    >>> name_from("birds@2024"), name_from(" ")
    ('birds-2024', 'dataset')
    """
    shown = "".join(c if is_displayable(c) and c not in "@/" else "-" for c in escape_non_utf8(text).strip())
    return unicodedata.normalize("NFC", shown)[:MAX_NAME_LENGTH].strip() or "dataset"


def folder_name(path: Path) -> str:
    """Return the name of the dataset in a folder: as it was given, not a link's target."""
    return name_from(Path(os.path.normpath(path.absolute())).name)


def split_pin(dataset: str, known: Collection[str]) -> tuple[str, str]:
    """Split ``NAME``, ``NAME@DIGEST`` or ``NAME@tuning`` into a name and a pin, which is "" without one.

    Parameters
    ----------
    dataset : str
    known : collection of str
        Names in the store. One that holds an @, as earlier versions published some, is found by itself.
    """
    if dataset in known:
        return dataset, ""
    name, _, pin = dataset.rpartition("@")
    if name in known:
        return name, pin
    name, _, pin = dataset.partition("@")
    return name, pin
