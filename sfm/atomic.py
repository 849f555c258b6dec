"""Atomic writes: a file or folder appears complete or not at all; links of its name are not followed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sfm.deletion import DeletionThroughLinkError, delete_without_following_links
from sfm.errors import InputError
from sfm.paths import list_without_hidden_and_system_files


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file atomically and sync it to disk.

    A link of its name is replaced, not followed.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    temporary = get_temporary_path(path)
    delete_path_if_exists(temporary)
    with atomic_open(path, temporary) as file:
        file.write(data)
    fsync_path(path.parent)


@contextmanager
def atomic_open(path: Path, temporary_path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing; it is synced and renamed to `path` when complete.

    Parameters
    ----------
    path : Path
        A file or link of this name is replaced.
    temporary_path : Path
        Name of the file until then, in the same folder; nothing may have it. After an error it is deleted.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    try:
        with temporary_path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary_path.replace(path)
    finally:
        with suppress(OSError):
            temporary_path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to `path` when complete.

    After an error nothing is left behind.

    Parameters
    ----------
    path : Path
    replace : bool
        True replaces a file, a folder or a link of the name, once everything new is on the disk. False
        fills a folder that is there, may be a file system of its own, and holds nothing but what operating
        systems leave in folders; it does not wait for the disk.

    Raises
    ------
    FileExistsError
        If nothing is to be replaced, and a file or a folder with content has the name.
    OSError
        If it cannot be written.
    """
    if (
        not replace
        and path.exists()
        and not (path.is_dir() and not list_without_hidden_and_system_files(path))
    ):
        raise FileExistsError(errno.EEXIST, "it exists already", str(path))
    fill = not replace and path.is_dir()
    temporary = path / get_temporary_path(path).name if fill else get_temporary_path(path)
    try:
        delete_path_if_exists(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        if fill:
            for child in temporary.iterdir():
                child.rename(path / child.name)
            delete_path_if_exists(temporary)
        else:
            if replace:
                for child in (*temporary.rglob("*"), temporary):
                    fsync_path(child)
                delete_path_if_exists(path)
            temporary.rename(path)
            if replace:
                fsync_path(path.parent)
    except BaseException:
        with suppress(OSError):
            delete_path_if_exists(temporary)
        raise


def get_temporary_path(path: Path) -> Path:
    """Return the name that a file or folder has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def make_folder_refusing_link(folder: Path) -> None:
    """Make a folder that this program keeps inside another, unless it is there.

    Raises
    ------
    InputError
        If it is a link.
    OSError
        If it cannot be made.
    """
    require_folder_is_not_link(folder)
    folder.mkdir(exist_ok=True)


def require_folder_is_not_link(folder: Path) -> None:
    """Refuse a link in place of a folder in which this program overwrites and deletes files.

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


def delete_path_if_exists(path: Path) -> None:
    """Delete a file, a folder with its content, or a link, but never the target of a link.

    Missing files are skipped.

    Raises
    ------
    OSError
        If something cannot be deleted.
    """
    try:
        delete_without_following_links(path.parent, path.name)
    except DeletionThroughLinkError:
        with suppress(FileNotFoundError):
            path.unlink()


def fsync_path(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
