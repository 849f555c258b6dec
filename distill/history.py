"""The course of a run, one row per step, as a CSV file that grows with it."""

import csv
import os
from pathlib import Path
from typing import TextIO

from sfm.distill.directory import write_file, writing
from sfm.errors import InputError
from sfm.untrusted_files import MAX_HISTORY_BYTES, read_bounded_file

COLUMNS = ("step", "loss", "learning_rate", "resolution", "seconds")


def open_history(path: Path, step: int) -> TextIO:
    """Open a history for appending, cut to the rows of the first `step` steps; make it if it is not there.

    Raises
    ------
    InputError
        If it cannot be written, or what is there is no history.
    """
    rows = read_lines(path)[1 : step + 1]
    write_file(path, "".join(f"{line}\n" for line in (",".join(COLUMNS), *rows)).encode())
    with writing(path):
        return path.open("a", newline="")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a history; none if it is not there.

    Raises
    ------
    InputError
        If it is no history.
    """
    try:
        return read_bounded_file(path, MAX_HISTORY_BYTES).decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text, or too long"
        raise InputError(f"cannot read {path}: {reason}; move it away") from error


def append(
    history: TextIO, step: int, loss: float, learning_rate: float, resolution: int, seconds: float
) -> None:
    """Add the row of a step (counted from 1); `seconds` is the wall time of the run so far.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    with writing(Path(history.name)):
        row = (step, f"{loss:.7g}", f"{learning_rate:.6g}", resolution, f"{seconds:.3f}")
        csv.writer(history, lineterminator="\n").writerow(row)
        history.flush()


def sync(history: TextIO) -> None:
    """Bring the rows to the disk, before a checkpoint relies on them.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    with writing(Path(history.name)):
        os.fsync(history.fileno())
