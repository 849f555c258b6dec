"""Text from data, made fit for display: one line, no control characters, printable on this terminal."""

import codecs
import unicodedata
from collections.abc import Sequence
from typing import Any

JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need; they neither move the cursor nor turn text around."""

PLAIN = {"–": "-", "—": "-", "…": "...", "±": "+/-", "×": "x", "→": "->", "·": "-", "’": "'"}
"""What this program's own signs become where an encoding lacks them."""

DEGRADE = "sfm.degrade"
"""Name of the codec error handler of :func:`degrade`."""


def first_line(error: BaseException) -> str:
    """Return what an error says, without what follows its first line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: str, most: int | None = None) -> str:
    r"""Return text as one line without control characters, fit for a terminal, a caption or a log.

    Line breaks, escape sequences, characters that turn the writing direction and bytes that are not UTF-8
    become backslash escapes; everything else stays as it is.

    Parameters
    ----------
    text : str
    most : int, optional
        Cut what is longer to so many characters, the last of which is then an ellipsis.

    Examples
    --------
    >>> print(one_line("cat\nFelis"), one_line("safe\u202etxt.exe"), one_line("abcdef", most=4))
    cat\nFelis safe\u202etxt.exe abc…
    """
    cut = text if most is None or len(text) <= most else text[: most - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(character if is_shown(character) else escape(character) for character in cut)


def format_names(names: Sequence[str], max_names: int = 5) -> str:
    """Return the first few names as text, and whether there are more: ``a, b and others``."""
    return ", ".join(names[:max_names]) + (" and others" if len(names) > max_names else "")


def is_shown(character: str) -> bool:
    """Say whether a character is displayed as itself and moves nothing but the cursor, by its own width."""
    return character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def escape(character: str) -> str:
    r"""Return the backslash escape of a character; of a byte that is not UTF-8, ``\xNN``."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode() if code > 0x7F else repr(character)[1:-1]


def encodable(text: str, encoding: str) -> str:
    """Return text that an encoding can hold; what it lacks is degraded or becomes backslash escapes."""
    return text.encode(encoding, DEGRADE).decode(encoding)


def degrade(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: a codec error handler, see :func:`codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(character) or escape(character) for character in lacking), error.end


codecs.register_error(DEGRADE, degrade)


def utf8_only(text: str) -> str:
    r"""Return text with bytes that are not UTF-8 (as file names hold them) written as ``\xNN``."""
    return "".join(escape(c) if unicodedata.category(c) == "Cs" else c for c in text)


def utf8_values(value: Any) -> Any:
    """Return what a JSON file is to hold, with all text in it as :func:`utf8_only` gives it."""
    if isinstance(value, str):
        return utf8_only(value)
    if isinstance(value, dict):
        return {utf8_values(name): utf8_values(own) for name, own in value.items()}
    return [utf8_values(own) for own in value] if isinstance(value, list) else value
