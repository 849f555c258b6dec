"""Delete files and folders below a root without ever following a symbolic link."""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path, PurePath

_OPEN_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class DeletionThroughLinkError(OSError):
    """The path to delete is a symbolic link, or leads through one."""


class DeletionDepthError(OSError):
    """The folder to delete is nested too deep."""


def delete_without_following_links(root: Path, relative_path: str | PurePath) -> None:
    """Delete a file, or a folder with its contents; do nothing if it does not exist.

    The root itself may be a link. Below it every folder is opened without following links, and everything
    is deleted relative to the opened folder: a folder that is swapped for a link in between is not entered.
    Links inside a deleted folder are deleted as links.

    Parameters
    ----------
    root : Path
    relative_path : str or PurePath
        Below `root`.

    Raises
    ------
    DeletionThroughLinkError
        If the path is a link, or leads through one; then nothing has been deleted.
    DeletionDepthError
        If folders are nested some hundred deep; shallower files may have been deleted.
    ValueError
        If the path is absolute, empty, or leads out of `root`.
    OSError
        If something cannot be deleted.
    """
    parts = PurePath(relative_path).parts
    if not parts or PurePath(relative_path).is_absolute() or ".." in parts:
        raise ValueError(f"{str(relative_path)!r} does not lie below {root}")
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
        folder = os.open(root, _OPEN_FOLDER_FLAGS)
        opened.callback(os.close, folder)
        for number, part in enumerate(parts[:-1], start=1):
            try:
                folder = os.open(part, _OPEN_FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
            except NotADirectoryError:
                _get_st_mode_refusing_link(folder, part, root.joinpath(*parts[:number]))
                return
            opened.callback(os.close, folder)
        if stat.S_ISDIR(_get_st_mode_refusing_link(folder, parts[-1], root / relative_path)):
            try:
                shutil.rmtree(parts[-1], dir_fd=folder, onerror=raise_rmtree_error_unless_missing)
            except (RecursionError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EMFILE:
                    raise
                # Every level takes a call and an open folder.
                raise DeletionDepthError(errno.ENAMETOOLONG, "too deep", str(root / relative_path)) from None
        else:
            os.unlink(parts[-1], dir_fd=folder)


def raise_rmtree_error_unless_missing(
    _function: object, _path: str, exc_info: tuple[type, BaseException, object]
) -> None:
    """Raise the error that :func:`shutil.rmtree` met, unless another process has deleted the file."""
    if not isinstance(exc_info[1], FileNotFoundError):
        raise exc_info[1]


def _get_st_mode_refusing_link(folder_descriptor: int, name: str, path_in_error: Path) -> int:
    """Return the ``st_mode`` of a file in an open folder.

    Raises
    ------
    DeletionThroughLinkError
        If it is a link; names `path_in_error`.
    """
    mode = os.stat(name, dir_fd=folder_descriptor, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        # open() with O_NOFOLLOW fails with ELOOP on a link.
        raise DeletionThroughLinkError(
            errno.ELOOP, "it is a symbolic link, which is not followed to delete", str(path_in_error)
        )
    return mode
