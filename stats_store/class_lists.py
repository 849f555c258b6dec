"""Lists of classes: parse the format of ``?classes=``, ``names=`` and ``--classes``, and look up classes."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sfm.errors import InputError
from sfm.text import sanitize_line
from sfm.untrusted_files import OversizeError, read_bounded_file


@dataclass(frozen=True)
class ParsedClassList:
    """A list of classes.

    Attributes
    ----------
    origin : str
        The file or the name it was read from.
    class_ids : list of str
        In the order of the list.
    display_names : dict of str to str
        Display names by class id, where the list gives them.
    """

    origin: str
    class_ids: list[str]
    display_names: dict[str, str]


class ClassListLine(NamedTuple):
    """A line of a class list that names a class; the display name is "" if there is none."""

    line_number: int
    class_name: str
    display_name: str


def normalize_class_id(text: str) -> str:
    """Return a class id in Unicode normal form C, so that it is spelled alike on every system."""
    return unicodedata.normalize("NFC", text)


def read_class_file(path: Path) -> ParsedClassList:
    """Read a class list from a file with one class per line.

    Raises
    ------
    InputError
        If the file cannot be read, is not UTF-8, or is not a class list.
    """
    return parse_class_list(read_class_list_text(path), str(path))


def read_class_list_text(path: Path) -> str:
    """Read the text of a class list without a byte order mark.

    Raises
    ------
    InputError
        If the file cannot be read, or is not UTF-8.
    """
    try:
        return read_bounded_file(path).decode("utf-8-sig")
    except OversizeError as error:
        raise InputError(f"{error}: not a class list") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a class list: it is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot read the class list {path}: {error.strerror or error}") from error


def iterate_class_list_lines(class_list_text: str) -> Iterator[ClassListLine]:
    r"""Yield the lines of a class list that name a class.

    Examples
    --------
    >>> [tuple(line) for line in iterate_class_list_lines("# languages\n\nc#\ngo\tGo\n")]
    [(3, 'c#', ''), (4, 'go', 'Go')]
    """
    # Not splitlines(), which also splits at characters that a name may hold.
    for number, line in enumerate(class_list_text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            name, _, display_name = (part.strip() for part in line.partition("\t"))
            yield ClassListLine(number, name, display_name)


def parse_class_list(text: str, origin: str) -> ParsedClassList:
    r"""Parse the text of a class list.

    Parameters
    ----------
    text : str
        One class id per line; a display name may follow a tab. Empty lines do not count, nor do those that
        begin with ``#``; elsewhere ``#`` is part of the id.
    origin : str
        Names the list in errors.

    Raises
    ------
    InputError
        If there is no class, or one twice.

    Examples
    --------
    >>> parse_class_list("# languages\nc#\ngo\tGo\n", "a list")
    ParsedClassList(origin='a list', class_ids=['c#', 'go'], display_names={'go': 'Go'})
    """
    lines: dict[str, int] = {}
    names: dict[str, str] = {}
    for number, name, display_name in iterate_class_list_lines(text):
        class_id = normalize_class_id(name)
        if class_id in lines:
            raise InputError(f"line {number} of class list {origin} repeats the class {class_id}")
        lines[class_id] = number
        if display_name:
            names[class_id] = display_name
    if not lines:
        raise InputError(f"class list {origin} holds no class")
    return ParsedClassList(origin, list(lines), names)


def replace_class_ids(class_list: ParsedClassList, new_class_ids: Sequence[str]) -> ParsedClassList:
    """Return a class list with its ids replaced, in the same order."""
    names = {
        new: class_list.display_names[old]
        for old, new in zip(class_list.class_ids, new_class_ids, strict=True)
        if old in class_list.display_names
    }
    return ParsedClassList(class_list.origin, list(new_class_ids), names)


def find_class_id(text: str, class_ids: Sequence[str]) -> str | None:
    """Return the class id that a text names; None if there is none.

    An identical id wins. Otherwise one in another Unicode normal form, or one that is displayed like the text
    (``sfm store show`` shows a line break as two characters).
    """
    if text in class_ids:
        return text
    normalized_text = normalize_class_id(text)
    matching_ids = (i for i in class_ids if normalize_class_id(i) == normalized_text)
    return next(matching_ids, None) or next((i for i in class_ids if sanitize_line(i) == text), None)
