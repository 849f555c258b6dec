"""Lists of classes: the one format of ``?classes=``, ``names=`` and ``--classes``; how a class is found."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfm.errors import InputError
from sfm.text import sanitize_line
from sfm.untrusted_files import OversizeError, read_bounded_file


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


def class_id_from(text: str) -> str:
    """Return the class id that a name or label means: a name has one spelling on every system (NFC)."""
    return unicodedata.normalize("NFC", text)


def read_class_file(path: Path) -> ClassList:
    """Read a file with one class per line.

    Raises
    ------
    InputError
        If it cannot be read, is not UTF-8, holds no class, or one twice.
    """
    return parse_class_list(read_list_text(path), str(path))


def read_list_text(path: Path) -> str:
    """Read the text of a class list; a byte order mark is no part of it.

    Raises
    ------
    InputError
        If it cannot be read, or is not UTF-8.
    """
    try:
        return read_bounded_file(path).decode("utf-8-sig")
    except OversizeError as error:
        raise InputError(f"{error}: it is no class list") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a class list: it is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot read the class list {path}: {error.strerror or error}") from error


def list_lines(content: str) -> Iterator[tuple[int, str, str]]:
    r"""Yield the lines of a class list that count: number, name, and the display name after a tab, or "".

    Examples
    --------
    >>> list(list_lines("# languages\n\nc#\ngo\tGo\n"))
    [(3, 'c#', ''), (4, 'go', 'Go')]
    """
    # Not splitlines(): a name may hold what that takes for the end of a line.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            name, _, shown = (part.strip() for part in line.partition("\t"))
            yield number, name, shown


def parse_class_list(content: str, origin: str) -> ClassList:
    r"""Parse a list of classes.

    Parameters
    ----------
    content : str
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
    ClassList(origin='a list', ids=['c#', 'go'], names={'go': 'Go'})
    """
    lines: dict[str, int] = {}
    names: dict[str, str] = {}
    for number, text, shown in list_lines(content):
        class_id = class_id_from(text)
        if class_id in lines:
            raise InputError(f"line {number} of class list {origin} repeats the class {class_id}")
        lines[class_id] = number
        if shown:
            names[class_id] = shown
    if not lines:
        raise InputError(f"class list {origin} holds no class")
    return ClassList(origin, list(lines), names)


def with_ids(chosen: ClassList, class_ids: Sequence[str]) -> ClassList:
    """Return a list with its classes under other ids, given in its order."""
    names = {
        new: chosen.names[old] for old, new in zip(chosen.ids, class_ids, strict=True) if old in chosen.names
    }
    return ClassList(chosen.origin, list(class_ids), names)


def find_class(text: str, class_ids: Sequence[str]) -> str | None:
    """Return the class id that a text means; None if there is none.

    The id itself wins. Otherwise the id in another Unicode normal form, or the one that is displayed so
    (``sfm store show`` shows a line break as two characters).
    """
    if text in class_ids:
        return text
    normal = class_id_from(text)
    alike = (i for i in class_ids if class_id_from(i) == normal)
    return next(alike, None) or next((i for i in class_ids if sanitize_line(i) == text), None)
