"""The files below a folder of a disk: links are followed, and what is passed over is counted."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from sfm.errors import InputError
from sfm.pipeline.sources.inventory import HIDDEN_KIND, SPECIAL_FILE_KIND

LINK_CYCLE_KIND = "links to a folder that holds them"
SYSTEM_FOLDERS = ("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information")
"""What file systems and file managers leave: copies, thumbnails, what cannot be read."""

MAX_FOLDER_DEPTH = 100
"""Folders of a dataset that lie one in another."""

MAX_FOLDER_VISITS = 100
"""Times that one folder is read; links that lead to each other multiply them without end."""


def accept_any_name(_: str) -> bool:
    """Return True, whatever the name."""
    return True


def walk_files(
    root: str, unused: Counter[str], wanted: Callable[[str], bool] = accept_any_name, depth: int | None = None
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files below a folder in the order of torchvision's ``ImageFolder``; links are followed.

    A folder's files come first, by name, then those of its folders. A link to a folder that holds it is not
    followed again.

    Parameters
    ----------
    unused : Counter
        Gets what is passed over, by kind: what is hidden, and what is neither file nor folder.
    wanted : callable
        Given a path below `root`, says whether a link of that name that leads nowhere matters.
    depth : int, optional
        Folders below one another that are entered at most; 0 for the files of `root` alone.

    Yields
    ------
    str, DirEntry
        Path below `root`, with slashes, and the file.

    Raises
    ------
    InputError
        If a folder cannot be read, or a link that matters leads nowhere; names it.
    """
    yield from _walk(root, "", frozenset(), unused, wanted, depth, Counter())


def _walk(
    folder: str,
    prefix: str,
    around: frozenset[tuple[int, int]],
    unused: Counter[str],
    wanted: Callable[[str], bool],
    depth: int | None,
    visits: Counter[tuple[int, int]],
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    if len(around) > MAX_FOLDER_DEPTH:
        raise InputError(
            f"the folder {folder} lies more than {MAX_FOLDER_DEPTH} folders deep: no dataset does"
        )
    try:
        status = Path(folder).stat()
        entries = scan_folder(folder)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    own = (status.st_dev, status.st_ino)
    if own in around:
        unused[LINK_CYCLE_KIND] += 1
        return
    visits[own] += 1
    if visits[own] > MAX_FOLDER_VISITS:
        raise InputError(f"links lead to the folder {folder} in more than {MAX_FOLDER_VISITS} ways")
    folders = []
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            unused[HIDDEN_KIND] += 1
        elif is_dangling_link(entry):
            if wanted(path):
                raise InputError(describe_dangling_link(entry.path))
            unused["links that lead nowhere"] += 1
        elif entry.is_dir() and entry.name in SYSTEM_FOLDERS:
            unused[f"in {entry.name}/"] += count_files_below(entry.path)
        elif entry.is_dir():
            folders.append(entry)
        elif entry.is_file():
            yield path, entry
        else:
            unused[SPECIAL_FILE_KIND] += 1
    for entry in folders if depth is None or depth > 0 else ():
        deeper = None if depth is None else depth - 1
        yield from _walk(entry.path, f"{prefix}{entry.name}/", around | {own}, unused, wanted, deeper, visits)


def scan_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return what a folder holds, by name."""
    with os.scandir(os.fspath(folder)) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def is_dangling_link(entry: os.DirEntry[str]) -> bool:
    """Say whether an entry is a link to what is not there, or cannot be reached."""
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError:
        return True
    return False


def describe_dangling_link(path: str | os.PathLike[str]) -> str:
    """Return the line that names a link which leads nowhere."""
    target = Path(path).readlink()
    return (
        f"{os.fspath(path)} is a link to {target}, which is not there: fetch its content (git annex get, dvc "
        f"pull, git lfs pull), mount the disk that it is on, or remove the link"
    )


def count_files_below(folder: str | os.PathLike[str]) -> int:
    """Return the number of files below a folder that is not read; links to folders are not followed."""
    try:
        return sum(len(names) for _, _, names in os.walk(folder))
    except RecursionError:
        raise InputError(
            f"the folder {folder} holds others more than {MAX_FOLDER_DEPTH} deep: delete it"
        ) from None
