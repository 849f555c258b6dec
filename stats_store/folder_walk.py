"""Walk the folders of a store on a disk, bounded in depth and links, past folders that cannot be listed."""

import datetime
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sfm.stats_store.system_errors import explain_denied_access

UNLISTABLE_ERRNOS = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ESTALE, errno.ENAMETOOLONG)
"""Errors that concern one folder only: the walk continues with the others."""

MAX_STORE_DEPTH = 100
"""Nested folders below a store that are listed; this program makes ten."""

MAX_FOLLOWED_LINKS = 1000
"""Links to folders that one walk follows: links to each other would never end."""


@dataclass(frozen=True)
class ListedPath:
    """A file of a local store, an empty folder, or a link: path below the root, size, time of change."""

    path: str
    size_bytes: int
    modified_time: datetime.datetime
    is_file: bool = True
    is_link: bool = False


def walk_store_paths(
    root: Path,
    prefix: str,
    on_unlistable: Callable[[Path], None],
    *,
    follow_links: bool = True,
    should_enter_folder: Callable[[str], object] = lambda _: True,
) -> Iterator[ListedPath]:
    """Yield the files and empty folders below a prefix; links are followed, but not in circles.

    Parameters
    ----------
    on_unlistable : callable
        Called with every folder that cannot be listed, is a file, lies deeper than ``MAX_STORE_DEPTH``, or
        is reached by a link after ``MAX_FOLLOWED_LINKS`` others; the walk continues.
    follow_links : bool
        If false, all links are yielded as links, also `prefix` if it is one.
    should_enter_folder : callable
        Called with the path of a folder; the folder is skipped if the result is false.
    """
    yield from _FolderWalk(root, on_unlistable, follow_links, should_enter_folder).walk_folder(prefix, ())


@dataclass
class _FolderWalk:
    """One walk; see :func:`walk_store_paths`."""

    root: Path
    on_unlistable: Callable[[Path], None]
    follow_links: bool
    should_enter_folder: Callable[[str], object]
    followed_link_count: int = 0

    def walk_folder(self, path: str, ancestor_inodes: tuple[tuple[int, int], ...]) -> Iterator[ListedPath]:
        """Yield the files below a folder; `ancestor_inodes` are device and inode of the folders above it."""
        folder = self.root / path
        try:
            state = folder.stat() if self.follow_links or not path else folder.lstat()
            if stat.S_ISLNK(state.st_mode):
                yield _make_listed_link(path, state)
                return
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return  # it does not exist, or its writer discarded it since it was listed
        except NotADirectoryError:
            if folder.is_file():
                self.on_unlistable(folder)
            return
        except OSError as error:
            self.report_unlistable_or_raise(folder, error)
            return
        if not entries:
            yield ListedPath(path, 0, get_modified_time(state), is_file=False)
        identity = (state.st_dev, state.st_ino)
        if identity in ancestor_inodes:
            return
        path_identities = (*ancestor_inodes, identity)
        for entry in entries:
            child = f"{path}/{entry.name}" if path else entry.name
            try:
                yield from self.walk_dir_entry(entry, child, path_identities)
            except FileNotFoundError:
                continue  # a writer renamed it since it was listed
            except OSError as error:
                self.report_unlistable_or_raise(self.root / child, error)

    def walk_dir_entry(
        self, entry: os.DirEntry[str], path: str, ancestor_inodes: tuple[tuple[int, int], ...]
    ) -> Iterator[ListedPath]:
        """Yield a file, a link, or the files below a folder."""
        if not self.follow_links and entry.is_symlink():
            yield _make_listed_link(path, entry.stat(follow_symlinks=False))
        elif entry.is_dir():
            if not self.should_enter_folder(path):
                return
            self.followed_link_count += entry.is_symlink()
            is_shallow = len(ancestor_inodes) <= MAX_STORE_DEPTH
            if is_shallow and (self.followed_link_count <= MAX_FOLLOWED_LINKS or not entry.is_symlink()):
                yield from self.walk_folder(path, ancestor_inodes)
            elif self.followed_link_count <= MAX_FOLLOWED_LINKS + 1:
                self.on_unlistable(self.root / path)
        elif entry.is_file():
            state = entry.stat()
            yield ListedPath(path, state.st_size, get_modified_time(state))

    def report_unlistable_or_raise(self, folder: Path, error: OSError) -> None:
        """Call `on_unlistable` for an error of one folder; raise others again."""
        if error.errno not in UNLISTABLE_ERRNOS:
            raise error
        self.on_unlistable(folder)


def _make_listed_link(path: str, stat_result: os.stat_result) -> ListedPath:
    return ListedPath(path, stat_result.st_size, get_modified_time(stat_result), is_file=False, is_link=True)


def explain_unlisted_folder(folder: Path) -> str:
    """Return why :func:`walk_store_paths` does not list a folder, in one line."""
    if folder.is_file():
        return f"cannot read {folder}: it is a file, not a folder"
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"cannot read {folder}: {explain_denied_access(folder)}"
    return (
        f"{folder} is not listed: it lies more than {MAX_STORE_DEPTH} folders deep, or behind more than "
        f"{MAX_FOLLOWED_LINKS} links; delete it"
    )


def get_modified_time(stat_result: os.stat_result) -> datetime.datetime:
    """Return the time of the last change."""
    return datetime.datetime.fromtimestamp(stat_result.st_mtime, datetime.UTC)
