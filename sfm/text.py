"""Make text from data safe to display: one line, no control characters, encodable by the terminal."""

import codecs
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

JOINER_CHARACTERS = "\u200c\u200d"
"""Format characters that scripts and emoji need; they neither move the cursor nor change the direction."""

CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that are escaped: controls, formats, surrogates, line separators."""

ASCII_REPLACEMENTS = {"–": "-", "—": "-", "…": "...", "±": "+/-", "×": "x", "→": "->", "·": "-", "’": "'"}
"""ASCII replacements for this program's characters that an encoding lacks."""

ENCODE_ERROR_HANDLER = "sfm.degrade"
"""Name of the codec error handler of :func:`replace_unencodable`."""


def get_first_error_line(error: BaseException) -> str:
    """Return the first line of an error's message; the name of its type if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sanitize_line(text: str, max_length: int | None = None) -> str:
    r"""Return text as one line without control characters, fit for a terminal, a caption or a log.

    Line breaks, escape sequences, characters that change the writing direction and bytes that are not UTF-8
    become backslash escapes; everything else stays as it is.

    Parameters
    ----------
    text : str
    max_length : int, optional
        Longer text is cut to this number of characters, the last of which is an ellipsis.

    Examples
    --------
    >>> print(sanitize_line("cat\nFelis"))
    cat\nFelis
    >>> print(sanitize_line("safe\u202etxt.exe"), sanitize_line("abcdef", max_length=4))
    safe\u202etxt.exe abc…
    """
    shortened = text if max_length is None or len(text) <= max_length else text[: max_length - 1] + "…"
    if shortened.isprintable():
        return shortened
    return "".join(c if is_displayable(c) else escape_character(c) for c in shortened)


def format_names(names: Sequence[str], max_shown_names: int = 5) -> str:
    """Return the first few names as text, and whether there are more: ``a, b and others``."""
    return ", ".join(names[:max_shown_names]) + (" and others" if len(names) > max_shown_names else "")


def format_words_as_list(words: Sequence[str]) -> str:
    """Return words as they are listed in a sentence: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def make_distinct_backbone_names(specs_and_sizes: Iterable[tuple[str, int | None]]) -> list[str]:
    """Return the spec of every backbone, with its input size where a spec is there at several sizes.

    Examples
    --------
    >>> make_distinct_backbone_names([("lite0", 32), ("lite1", 32), ("lite0", 48)])
    ['lite0 at 32 px', 'lite1', 'lite0 at 48 px']
    """
    backbones = list(specs_and_sizes)
    specs = [spec for spec, _ in dict.fromkeys(backbones)]
    return [
        f"{spec} at {size} px" if specs.count(spec) > 1 and size is not None else spec
        for spec, size in backbones
    ]


def is_displayable(character: str) -> bool:
    """Return whether a character displays as itself and only moves the cursor by its width."""
    return character in JOINER_CHARACTERS or unicodedata.category(character) not in CONTROL_CATEGORIES


def escape_character(character: str) -> str:
    r"""Return the backslash escape of a character; of a byte that is not UTF-8, ``\xNN``."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode() if code > 0x7F else repr(character)[1:-1]


def make_encodable(text: str, encoding: str) -> str:
    """Return text that an encoding has; other characters become ASCII or backslash escapes."""
    return text.encode(encoding, ENCODE_ERROR_HANDLER).decode(encoding)


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks: a codec error handler, see :func:`codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII_REPLACEMENTS.get(c) or escape_character(c) for c in lacking), error.end


codecs.register_error(ENCODE_ERROR_HANDLER, replace_unencodable)


def escape_non_utf8(text: str) -> str:
    r"""Return text with bytes that are not UTF-8 (as file names hold them) written as ``\xNN``."""
    return "".join(escape_character(c) if unicodedata.category(c) == "Cs" else c for c in text)


def escape_non_utf8_in_json(value: Any) -> Any:
    """Return JSON data with all text in it as :func:`escape_non_utf8` gives it."""
    if isinstance(value, str):
        return escape_non_utf8(value)
    if isinstance(value, dict):
        return {escape_non_utf8_in_json(name): escape_non_utf8_in_json(item) for name, item in value.items()}
    return [escape_non_utf8_in_json(item) for item in value] if isinstance(value, list) else value


def format_percent(fraction: float | None, standard_deviation: float | None = None) -> str:
    """Return a fraction in percent, with its standard deviation if given; a dash for None."""
    if fraction is None:
        return "–"
    return f"{100 * fraction:.1f}" + (
        "" if standard_deviation is None else f" ± {100 * standard_deviation:.1f}"
    )
