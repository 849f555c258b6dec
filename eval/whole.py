"""Files that are there whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sfm.errors import InputError
from sfm.paths import content


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or, after an error, as it was; its folder is made if need be.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the name `path` once everything is in it.

    After an error nothing is left behind.

    Raises
    ------
    InputError
        If there is a file of that name, or a folder that is not empty, or it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file: give a folder")
    if path.is_dir() and content(path):
        raise InputError(f"--out {path} is not empty: give a new folder")
    # A folder that is there may be a file system of its own, and hold what systems leave in folders.
    partial = (path if path.is_dir() else path.parent) / f".{path.name}.partial"
    try:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if partial.parent == path:
                for part in partial.iterdir():
                    part.rename(path / part.name)
                partial.rmdir()
            else:
                partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
