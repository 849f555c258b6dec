"""Files that are there whole or not at all, in folders in which others may have put links."""

import os
from contextlib import suppress
from pathlib import Path

from sfm.deletion import LinkError, delete_below
from sfm.errors import InputError


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole, on the disk, or as it was.

    A link of its name is replaced, not followed.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that this program keeps inside another, unless it is there.

    Raises
    ------
    InputError
        If it is a link.
    OSError
        If it cannot be made.
    """
    require_no_link(folder)
    folder.mkdir(exist_ok=True)


def require_no_link(folder: Path) -> None:
    """Refuse a link in the place of a folder in which this program writes over and deletes its own files.

    Raises
    ------
    InputError
        If it is one.
    """
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a symbolic link, behind which nothing is written or deleted: put a folder in its "
            f"place, or give another directory"
        )


def remove(path: Path) -> None:
    """Delete a file, a folder with all it holds, or a link, but never what is behind one.

    What is gone already is passed over.

    Raises
    ------
    OSError
        If something cannot be deleted.
    """
    try:
        delete_below(path.parent, path.name)
    except LinkError:
        with suppress(FileNotFoundError):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
