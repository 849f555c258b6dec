"""The history of a run: ``history.csv``, to which every step appends a row."""

import csv
import os
from pathlib import Path
from typing import TextIO

from sfm.distill.run_files import translate_run_write_errors, write_run_file
from sfm.distill.train_step import StepOutput
from sfm.errors import InputError
from sfm.untrusted_files import MAX_HISTORY_BYTES, read_bounded_file

COLUMNS = ("step", "loss", "learning_rate", "resolution", "seconds")


def open_truncated_history(path: Path, kept_step_count: int) -> TextIO:
    """Open a history for appending, cut to the first `kept_step_count` rows; create it unless it exists.

    Raises
    ------
    InputError
        If it cannot be written, or the file is not a history.
    """
    rows = read_history_lines(path)[1 : kept_step_count + 1]
    write_run_file(path, "".join(f"{line}\n" for line in (",".join(COLUMNS), *rows)).encode())
    with translate_run_write_errors(path):
        return path.open("a", newline="")


def read_history_lines(path: Path) -> list[str]:
    """Read the lines of a history; none if it does not exist.

    Raises
    ------
    InputError
        If the file is not a history.
    """
    try:
        return read_bounded_file(path, MAX_HISTORY_BYTES).decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text, or too long"
        raise InputError(f"cannot read {path}: {reason}; move it away") from error


def append_and_flush_history_row(history: TextIO, output: StepOutput, elapsed_seconds: float) -> None:
    """Add the row of a step; `elapsed_seconds` is the wall time of the run until now.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    row = (
        output.step,
        f"{output.loss:.7g}",
        f"{output.learning_rate:.6g}",
        output.resolution,
        f"{elapsed_seconds:.3f}",
    )
    with translate_run_write_errors(Path(history.name)):
        csv.writer(history, lineterminator="\n").writerow(row)
        history.flush()


def sync_history(history: TextIO) -> None:
    """Write the rows to the disk, before a checkpoint relies on them.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    with translate_run_write_errors(Path(history.name)):
        os.fsync(history.fileno())
