"""Lines on stdout and stderr: no control characters, in an encoding that the terminal can show."""

import io
import json
import logging
import shlex
import sys
from typing import Any, TextIO

from rich.console import Console

from sfm.text import ENCODE_ERROR_HANDLER, make_encodable, sanitize_line


class OneLineFormatter(logging.Formatter):
    """Formatter that writes every log message as one line, fit for a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the message of a record as one line."""
        return sanitize_line(super().formatMessage(record))


def escape_unencodable_output_and_log_lines() -> None:
    """Replace characters that stdout or stderr cannot encode, and log messages as one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ENCODE_ERROR_HANDLER)
    if logging.lastResort:
        logging.lastResort.setFormatter(OneLineFormatter())


def open_console(*, stderr: bool = False) -> Console:
    """Return a rich console that prints text literally: no markup, no emoji codes, no highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def sanitize_line_for_console(text: str, console: Console, max_length: int | None = None) -> str:
    """Return text as one line that a console can print."""
    return make_encodable(sanitize_line(text, max_length), console.encoding)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print text as one line; control characters in it are escaped."""
    print(sanitize_line(text), file=file)


def print_next_command(*command_words: object) -> None:
    """Print the ``sfm`` command to run next, quoted for a shell."""
    print_line(f"Next: {shlex.join(['sfm', *map(str, command_words)])}")


def print_json(document: Any) -> None:
    """Print the JSON document of a command that was given ``--json``."""
    print(json.dumps(document, indent=1))  # noqa: T201
