"""Write a run's directory atomically, with failures translated into errors for users."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sfm.atomic import atomic_folder, atomic_write
from sfm.errors import InputError
from sfm.text import get_first_error_line

LOG = logging.getLogger(__name__)


@contextmanager
def translate_run_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` (disk full, no permission) into an :class:`InputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"cannot write {path}: {reason}; free some space or allow writing, then repeat with --resume"
        ) from error


@contextmanager
def log_write_errors_as_warnings(path: Path) -> Iterator[None]:
    """Log a failure to write `path`, which no other file depends on, as a warning."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = get_first_error_line(error)
        LOG.warning("%s is missing, the run is complete without it: %s", path, reason)


def write_run_file(path: Path, data: bytes) -> None:
    """Write a file atomically, and sync it to the disk.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    with translate_run_write_errors(path):
        atomic_write(path, data)


@contextmanager
def write_run_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to `path` once its content is on the disk.

    A folder, or a link, of that name is replaced. After an error nothing is left behind.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    with translate_run_write_errors(path), atomic_folder(path, replace=True) as partial:
        yield partial
