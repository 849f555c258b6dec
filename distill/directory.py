"""How a run's directory is written: whole files and whole folders appear, or nothing does."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sfm.errors import InputError

LOG = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` (disk full, no permission) into an :class:`InputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"cannot write {path}: {reason}; free some space or allow writing, then repeat with --resume"
        ) from error


@contextmanager
def not_essential(path: Path) -> Iterator[None]:
    """Turn any failure to make `path`, which only people look at, into a warning: the result stands."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = str(error).partition("\n")[0] or type(error).__name__
        LOG.warning("%s is missing, the run is complete without it: %s", path, reason)


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole, on the disk, or not at all.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the name `path` once everything in it is on the disk.

    A folder that had the name before is replaced. After an error nothing is left behind.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for inside in (*partial.rglob("*"), partial):
                _sync(inside)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
