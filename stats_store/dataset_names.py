"""Names of datasets: check them, derive them from other texts, and split ``NAME@DIGEST``."""

import os
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import TypeAlias

from sfm.constrained_types import MAX_NAME_LENGTH
from sfm.text import escape_non_utf8, is_displayable

PinnedName: TypeAlias = str
"""``NAME``, ``NAME@DIGEST`` (any beginning of an entry digest) or ``NAME@tuning``."""


def find_dataset_name_problem(name: str) -> str | None:
    """Return why a text is not a valid dataset name; None if it is one."""
    if "@" in name or name.strip() != name or not name:
        return "must not contain @ or begin or end with a blank"
    if len(name) > MAX_NAME_LENGTH:
        return f"must not be longer than {MAX_NAME_LENGTH} characters"
    if not all(map(is_displayable, name)):
        return "must be one line without control characters"
    return None


def make_dataset_name(text: str) -> str:
    """Return a valid dataset name made of any text, such as a folder name; invalid characters become dashes.

    Examples
    --------
    >>> make_dataset_name("birds@2024"), make_dataset_name(" ")
    ('birds-2024', 'dataset')
    """
    visible = "".join(
        c if is_displayable(c) and c not in "@/" else "-" for c in escape_non_utf8(text).strip()
    )
    return unicodedata.normalize("NFC", visible)[:MAX_NAME_LENGTH].strip() or "dataset"


def make_dataset_name_from_folder(folder: Path) -> str:
    """Return the dataset name for a folder: from the path as given, not from the target of a link."""
    return make_dataset_name(Path(os.path.normpath(folder.absolute())).name)


def split_pinned_name(pinned_name: PinnedName, stored_names: Collection[str]) -> tuple[str, str]:
    """Split ``NAME``, ``NAME@DIGEST`` or ``NAME@tuning`` into a name and a pin, which is "" without one.

    Parameters
    ----------
    pinned_name : str
    stored_names : collection of str
        Names in the store. A stored name may itself contain an @: earlier versions allowed it.
    """
    if pinned_name in stored_names:
        return pinned_name, ""
    name, _, pin = pinned_name.rpartition("@")
    if name in stored_names:
        return name, pin
    name, _, pin = pinned_name.partition("@")
    return name, pin
