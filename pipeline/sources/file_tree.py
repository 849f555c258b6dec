"""Walk the files below a folder: links are followed, and files that are not used are counted."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from sfm.errors import InputError
from sfm.pipeline.sources.inventory import HIDDEN_KIND, SPECIAL_FILE_KIND

LINK_CYCLE_KIND = "links to a folder that holds them"
SYSTEM_FOLDERS = ("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information")
"""Folders of file systems and file managers, with thumbnails, copies and fragments."""

MAX_FOLDER_DEPTH = 100
"""Maximum depth of nested folders."""

MAX_FOLDER_VISITS = 100
"""Maximum number of visits of one folder, because links may form cycles."""


def refuses_every_dangling_link(_path: str) -> bool:
    """Return True: the default of :func:`walk_relative_paths_and_entries`."""
    return True


def walk_relative_paths_and_entries(
    root: str,
    unused_by_kind: Counter[str],
    refuses_dangling_link: Callable[[str], bool] = refuses_every_dangling_link,
    max_depth: int | None = None,
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files below a folder in the order of torchvision's ``ImageFolder``; links are followed.

    A folder's files come first, by name, then those of its folders. A link to a folder that holds it is not
    followed again.

    Parameters
    ----------
    root : str
    unused_by_kind : Counter
        Counts skipped files by kind: hidden files, and those that are neither file nor folder.
    refuses_dangling_link : callable
        Given a path below `root`, returns whether a dangling link of that name stops the run.
    max_depth : int, optional
        Maximum depth of folders; 0 for only the files in `root`.

    Yields
    ------
    str, DirEntry
        Path below `root`, with slashes, and the file.

    Raises
    ------
    InputError
        If a folder cannot be read, or a needed link is dangling.
    """
    yield from _walk_folder(
        root, "", frozenset(), unused_by_kind, refuses_dangling_link, max_depth, Counter()
    )


def _walk_folder(
    folder: str,
    path_prefix: str,
    parent_inodes: frozenset[tuple[int, int]],
    unused_by_kind: Counter[str],
    refuses_dangling_link: Callable[[str], bool],
    max_depth: int | None,
    visit_count_by_inode: Counter[tuple[int, int]],
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    if len(parent_inodes) > MAX_FOLDER_DEPTH:
        raise InputError(
            f"the folder {folder} lies more than {MAX_FOLDER_DEPTH} folders deep: no dataset does"
        )
    try:
        status = Path(folder).stat()
        entries = list_sorted_entries(folder)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    inode = (status.st_dev, status.st_ino)
    if inode in parent_inodes:
        unused_by_kind[LINK_CYCLE_KIND] += 1
        return
    visit_count_by_inode[inode] += 1
    if visit_count_by_inode[inode] > MAX_FOLDER_VISITS:
        raise InputError(f"links lead to the folder {folder} in more than {MAX_FOLDER_VISITS} ways")
    folders = []
    for entry in entries:
        path = f"{path_prefix}{entry.name}"
        if entry.name.startswith("."):
            unused_by_kind[HIDDEN_KIND] += 1
        elif is_dangling_link(entry):
            if refuses_dangling_link(path):
                raise InputError(describe_dangling_link(entry.path))
            unused_by_kind["links that lead nowhere"] += 1
        elif entry.is_dir() and entry.name in SYSTEM_FOLDERS:
            unused_by_kind[f"in {entry.name}/"] += count_files_below(entry.path)
        elif entry.is_dir():
            folders.append(entry)
        elif entry.is_file():
            yield path, entry
        else:
            unused_by_kind[SPECIAL_FILE_KIND] += 1
    if max_depth == 0:
        return
    for entry in folders:
        yield from _walk_folder(
            entry.path,
            f"{path_prefix}{entry.name}/",
            parent_inodes | {inode},
            unused_by_kind,
            refuses_dangling_link,
            None if max_depth is None else max_depth - 1,
            visit_count_by_inode,
        )


def list_sorted_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name."""
    with os.scandir(os.fspath(folder)) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def is_dangling_link(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link whose target is missing or unreachable."""
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError:
        return True
    return False


def describe_dangling_link(path: str | os.PathLike[str]) -> str:
    """Return the error message for a dangling link."""
    target = Path(path).readlink()
    return (
        f"{os.fspath(path)} is a link to {target}, which is not there: fetch its content (git annex get, dvc "
        f"pull, git lfs pull), mount the disk that it is on, or remove the link"
    )


def count_files_below(folder: str | os.PathLike[str]) -> int:
    """Return the number of files below a folder; links to folders are not followed."""
    try:
        return sum(len(names) for _, _, names in os.walk(folder))
    except RecursionError:
        raise InputError(
            f"the folder {folder} holds others more than {MAX_FOLDER_DEPTH} deep: delete it"
        ) from None
