"""Files and folders that evaluation, report and export write, and names for several runs."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sfm.atomic import atomic_folder, atomic_write, delete_path_if_exists, get_temporary_path
from sfm.errors import InputError
from sfm.paths import list_without_hidden_and_system_files, resolve_links


def write_output(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made if need be.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    with translate_write_errors(path):
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, content)


@contextmanager
def translate_write_errors(path: Path, message_suffix: str = "") -> Iterator[None]:
    """Turn a failure to write `path` into an :class:`InputError` that ends with a hint."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}{message_suffix}") from error


def make_parent_and_require_writable(path: Path) -> None:
    """Refuse an output file that cannot be written before work begins; make its folder.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    temporary = get_temporary_path(path)
    with translate_write_errors(path, "; give --out to put the result elsewhere"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        delete_path_if_exists(temporary)
        temporary.touch(exist_ok=False)
        delete_path_if_exists(temporary)


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to `path` when complete.

    After an error nothing is left behind.

    Raises
    ------
    InputError
        If there is a file of that name, or a folder that is not empty, or it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file: give a folder")
    if path.is_dir() and list_without_hidden_and_system_files(path):
        raise InputError(f"--out {path} is not empty: give a new folder")
    with translate_write_errors(path), atomic_folder(path, replace=False) as temporary:
        yield temporary


def make_distinct_directory_names(directories: Sequence[Path]) -> list[str]:
    """Name directories by the fewest trailing path components that make the names distinct."""
    paths = [resolve_links(path) for path in directories]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("two paths are the same")
