"""Errors of a command: one line on stderr and an exit status."""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from sfm.errors import DamageError, InputError
from sfm.interrupts import make_signals_raise_keyboard_interrupt
from sfm.terminal import print_line
from sfm.text import sanitize_line

EXIT_UNFINISHED = 1
EXIT_INTERRUPTED = 130

MAX_ERROR_LENGTH = 4000
"""Characters of an error message: names in it are untrusted."""


def print_error_and_make_exit(message: str, exit_status: int) -> typer.Exit:
    """Print an error as one line on stderr; return the exit to raise."""
    print_line(f"error: {sanitize_line(message, MAX_ERROR_LENGTH)}", file=sys.stderr)
    return typer.Exit(exit_status)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn exceptions into one line and an exit status: 2 bad input, 1 damage, 130 interrupted."""
    make_signals_raise_keyboard_interrupt()
    try:
        yield
    except InputError as error:
        raise print_error_and_make_exit(str(error), 2) from None
    except (DamageError, FloatingPointError) as error:
        raise print_error_and_make_exit(str(error), 1) from None
    except KeyboardInterrupt:
        raise print_error_and_make_exit("interrupted", EXIT_INTERRUPTED) from None
    except Exception as error:
        reason = describe_if_disk_full_or_permission_denied(error) or describe_if_out_of_memory(error)
        if reason is None:
            raise
        raise print_error_and_make_exit(reason, 2) from None


@contextmanager
def exit_with_message_on_interrupt(message_suffix: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, print the state that the command leaves and how to resume it, and exit.

    Parameters
    ----------
    message_suffix : str or callable
        Text that follows "error: interrupted", or a function that is called for it after the interrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        explanation = message_suffix if isinstance(message_suffix, str) else message_suffix()
        raise print_error_and_make_exit(f"interrupted{explanation}", EXIT_INTERRUPTED) from None


def describe_if_out_of_memory(error: BaseException) -> str | None:
    """Return a message if the CPU or a GPU ran out of memory; None for any other error."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"not enough memory: ask for fewer images or views at a time ({text})"
    return None


def describe_if_disk_full_or_permission_denied(error: BaseException) -> str | None:
    """Return a message if a disk is full or a place cannot be written; None for any other error.

    Object stores report a full disk as a different error that quotes the operating system.
    """
    text = str(error).partition("\n")[0]
    path = getattr(error, "filename", None)
    at = f" at {path}" if path else ""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"no space left on the disk{at}: free some and run the same command again ({text})"
    if isinstance(error, PermissionError) or "Permission denied" in text:
        return f"permission denied{at}: {text}"
    return None
