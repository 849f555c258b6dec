"""Files that are there whole, or not at all, and the names of what is written."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sfm.atomic import remove, write_file
from sfm.errors import InputError
from sfm.paths import list_content, resolve_links


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or, after an error, as it was; its folder is made if need be.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold; makes its folder.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        remove(partial)
        partial.touch(exist_ok=False)
        remove(partial)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; give --out to put the result elsewhere"
        ) from error


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
    if path.is_dir() and list_content(path):
        raise InputError(f"--out {path} is not empty: give a new folder")
    # A folder that is there may be a file system of its own, and hold what systems leave in folders.
    partial = (path if path.is_dir() else path.parent) / f".{path.name}.partial"
    try:
        try:
            remove(partial)
            partial.mkdir(parents=True)
            yield partial
            if partial.parent == path:
                for part in partial.iterdir():
                    part.rename(path / part.name)
                remove(partial)
            else:
                partial.rename(path)
        except BaseException:
            with suppress(OSError):
                remove(partial)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def distinct_names(given: Sequence[Path]) -> list[str]:
    """Name directories by as few of their last folders as tell them apart."""
    paths = [resolve_links(path) for path in given]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("two paths are the same")
