"""Deletion that never leaves its root: no symbolic link is followed, at any level, whoever swaps one in."""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path, PurePath

_OPEN_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class LinkError(OSError):
    """What was to be deleted is a symbolic link, or lies behind one."""


class DepthError(OSError):
    """What was to be deleted holds folders that lie too deep in one another."""


def delete_below(root: Path, path: str | PurePath) -> None:
    """Delete a file, or a folder with all it holds; what is gone already is passed over.

    The root itself may be a link, since whoever names it means where it leads. Below it every folder is
    opened without following links, and everything is deleted relative to the folder that was opened: a
    folder that is swapped for a link meanwhile is not entered. Links inside a folder that is deleted are
    deleted as links.

    Parameters
    ----------
    root : Path
    path : str or PurePath
        Relative to `root`.

    Raises
    ------
    LinkError
        If the path is a link, or leads through one; nothing has been deleted then.
    DepthError
        If some hundred folders in it lie one in another; what is not so deep may have been deleted.
    ValueError
        If the path is absolute, empty, or leads out of `root`.
    OSError
        If something cannot be deleted.
    """
    parts = PurePath(path).parts
    if not parts or PurePath(path).is_absolute() or ".." in parts:
        raise ValueError(f"{str(path)!r} does not lie below {root}")
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
        folder = os.open(root, _OPEN_FOLDER_FLAGS)
        opened.callback(os.close, folder)
        for number, part in enumerate(parts[:-1], start=1):
            try:
                folder = os.open(part, _OPEN_FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
            except NotADirectoryError:
                _refuse_link(folder, part, root.joinpath(*parts[:number]))
                return
            opened.callback(os.close, folder)
        if stat.S_ISDIR(_refuse_link(folder, parts[-1], root / path)):
            try:
                shutil.rmtree(parts[-1], dir_fd=folder, onerror=reraise_unless_missing)
            except (RecursionError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EMFILE:
                    raise
                # Every level takes a call and an open folder.
                raise DepthError(errno.ENAMETOOLONG, "too deep", str(root / path)) from None
        else:
            os.unlink(parts[-1], dir_fd=folder)


def reraise_unless_missing(_: object, __: str, error: tuple[type, BaseException, object]) -> None:
    """Pass over what somebody else deleted a moment ago, and raise anything else."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _refuse_link(folder: int, name: str, shown: Path) -> int:
    """Return the mode of an entry of an open folder; raise :class:`LinkError` if it is a link."""
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        # errno.ELOOP is what the system answers to who opens a link without following it.
        raise LinkError(errno.ELOOP, "it is a symbolic link, which is not followed to delete", str(shown))
    return mode
