"""Create the files of a store on a disk: atomically, exclusively, and with the permissions of its folder."""

import ctypes
import errno
import os
import re
import secrets
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from obstore.store import LocalStore, ObjectStore

from sfm.errors import InputError

UNFINISHED_FILE_NAME = re.compile(r"#\d+$")
"""Ending of the name of a file that is being written. Listings skip it; a killed writer leaves it behind."""

NO_HARD_LINK_ERRNOS = (
    *(errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL),
)
"""Errors of file systems without hard links: exFAT, FAT, many network and FUSE mounts."""

NO_FSYNC_ERRNOS = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)
"""Errors of file systems that cannot sync a folder, or a file of another user."""

AT_FDCWD, LINUX_NO_REPLACE, MACOS_NO_REPLACE = -100, 1, 4


def get_local_root(objects: ObjectStore) -> Path | None:
    """Return the folder of a store on a local disk; None for any other store."""
    return Path(objects.prefix) if isinstance(objects, LocalStore) and objects.prefix else None


def copy_permissions(target: Path, reference_folder: Path) -> None:
    """Copy the permissions and the group of a folder to a file or folder, independent of the umask.

    Changes that the system refuses are skipped.
    """
    with suppress(OSError):
        reference_state, own_state = reference_folder.stat(), target.stat()
        is_folder = stat.S_ISDIR(own_state.st_mode)
        mode = (
            reference_state.st_mode & 0o3777 | 0o700 if is_folder else reference_state.st_mode & 0o666 | 0o600
        )
        if own_state.st_gid != reference_state.st_gid:
            with suppress(OSError):
                os.chown(target, -1, reference_state.st_gid)
        if stat.S_IMODE(target.stat().st_mode) != mode:
            target.chmod(mode)


def make_folder_below_root(folder: Path, root: Path) -> None:
    """Create a folder below a root, and its parents, with the permissions of the root.

    A folder directly below the root may be a link to another disk. A link further down may lead anywhere, so
    nothing is written behind it.

    Raises
    ------
    InputError
        If a file, or a link further down, has the name of a folder.
    """
    if folder == root:
        return
    make_folder_below_root(folder.parent, root)
    if folder.is_symlink() and folder.parent != root:
        raise InputError(
            f"cannot write below {folder}: it is a symbolic link, behind which nothing is written; put a "
            f"folder in its place"
        )
    if folder.is_dir():
        return
    with suppress(FileExistsError):
        folder.mkdir()
        copy_permissions(folder, root)
    if not folder.is_dir():
        obstacle = (
            "a symbolic link that leads to no folder" if folder.is_symlink() else "a file, not a folder"
        )
        raise InputError(f"cannot write below {folder}: it is {obstacle}")


def resolve_object_path(root: Path, path: str) -> Path:
    """Return the file of the object at a path below a root.

    Raises
    ------
    ValueError
        If the path would leave the root: a commit from elsewhere may hold any path.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{path!r} is not the path of an object")
    return root.joinpath(*parts)


def create_file_exclusively(root: Path, path: str, data: bytes, *, sync_to_disk: bool) -> None:
    """Create a file below a root atomically, with the permissions of the root, unless its name is taken.

    Parameters
    ----------
    sync_to_disk : bool
        Return only once the content would survive a power cut.

    Raises
    ------
    FileExistsError
        If the name is taken; the existing file is left unchanged.
    """
    target = resolve_object_path(root, path)
    make_folder_below_root(target.parent, root)
    # Listings skip names like this: see UNFINISHED_FILE_NAME.
    unfinished_path = target.with_name(f"{target.name}#{secrets.randbits(60)}")
    try:
        with unfinished_path.open("xb") as file:
            copy_permissions(unfinished_path, root)
            file.write(data)
            file.flush()
            if sync_to_disk:
                fsync_if_supported(unfinished_path)
        link_or_rename_exclusively(unfinished_path, target)
    finally:
        with suppress(OSError):
            unfinished_path.unlink(missing_ok=True)


def link_or_rename_exclusively(source: Path, target: Path) -> None:
    """Give a file its final name atomically unless it is taken: by a hard link, or else by a rename.

    A hard link leaves the source, too.

    Raises
    ------
    FileExistsError
        If the name is taken.
    OSError
        ``ENOTSUP`` if the file system supports neither hard links nor exclusive renames.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_HARD_LINK_ERRNOS:
            raise
        rename_exclusively(source, target)


def rename_exclusively(source: Path, target: Path) -> None:
    """Rename a file unless the name is taken: `os.rename` would replace the file that has it."""
    library = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(AT_FDCWD, old, AT_FDCWD, new, LINUX_NO_REPLACE)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(old, new, MACOS_NO_REPLACE)
    else:
        raise OSError(errno.ENOTSUP, "neither hard links nor exclusive renames", str(target))
    if failed:
        errno_value = ctypes.get_errno()
        is_unsupported = errno_value in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
        raise OSError(errno.ENOTSUP if is_unsupported else errno_value, os.strerror(errno_value), str(target))


def fsync_if_supported(path: Path) -> None:
    """Sync a file or folder to disk, where the file system supports it."""
    try:
        # Opening a pipe must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        return  # it belongs to another user, who has synced it
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC_ERRNOS:
            raise
    finally:
        os.close(descriptor)


def resolve_store_folder(path: Path, *, allow_missing: bool) -> Path:
    """Return the absolute path of the folder of a store, after checking that it is one.

    Raises
    ------
    InputError
        If the path is a file, or there is no folder and `allow_missing` is false.
    OSError
        If the system refuses access to it.
    """
    try:
        file_state = path.stat()
    except FileNotFoundError:
        if not allow_missing:
            raise InputError(
                f"no store at {path}: no such folder; create one with "
                f"`sfm extract --store {shlex.quote(str(path))}`"
            ) from None
    except ValueError:
        raise InputError("the path of the store holds a null character") from None
    else:
        if not stat.S_ISDIR(file_state.st_mode):
            raise InputError(f"no store at {path}: it is a file; give a folder")
    return path.absolute()
