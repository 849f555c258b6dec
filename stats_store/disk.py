"""A store's files on a disk: written whole or not at all, open to whom the store's folder is open to."""

import ctypes
import datetime
import errno
import os
import re
import secrets
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from obstore.store import LocalStore, ObjectStore

from sfm.errors import InputError

UNFINISHED = re.compile(r"#\d+$")
"""How a local file is named until it is complete; no listing shows it, and a killed writer leaves it."""

NO_LINKS = (
    *(errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL),
)
"""How file systems say that they have no hard links: exFAT, FAT, many network and FUSE mounts."""

NO_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)
"""How they say that a folder, or a file of another user, cannot be synced."""

AT_WORKING_FOLDER, LINUX_NO_REPLACE, MACOS_NO_REPLACE = -100, 1, 4

WHY = {
    errno.EROFS: "the file system is read-only",
    errno.EDQUOT: "your disk quota is used up: free some and run the same command again",
    errno.ENAMETOOLONG: "the path is too long for the file system: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.EIO: "the disk reports an input/output error: check it before anything else",
    errno.ESTALE: "the network share went away (stale file handle): mount it again",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n`",
    errno.ENOTSUP: "its file system has neither hard links nor exclusive renames, without which two writers "
    "overwrite each other: use another disk",
}
"""What a person can make of an error of the system, by its number."""


UNLISTED = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ESTALE, errno.ENAMETOOLONG)
"""What the system says of one folder that cannot be listed; others may well be."""

DEEPEST = 100
"""Folders that lie one in another below a store's; this program makes ten."""

MOST_LINKS = 1000
"""Links to folders that one listing follows: a few that lead to each other are a listing without end."""


@dataclass(frozen=True)
class LocalFile:
    """A file of a local store, an empty folder, or a link: path below the root, size, time of change."""

    path: str
    size: int
    modified: datetime.datetime
    is_file: bool = True
    is_link: bool = False


def local_root(objects: ObjectStore) -> Path | None:
    """Return the folder of a store on this machine's disks; None for any other."""
    return Path(objects.prefix) if isinstance(objects, LocalStore) and objects.prefix else None


def system_errno(error: BaseException) -> int | None:
    """Return the system's number of an error, also of one that obstore reports in its own words."""
    number = getattr(error, "errno", None)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return number if isinstance(number, int) else int(found[1]) if found else None


def is_denied(error: BaseException) -> bool:
    """Say whether the system refused access."""
    return system_errno(error) in (errno.EACCES, errno.EPERM)


def path_of(error: BaseException) -> Path | None:
    """Return the path that an error of the system is about, if it says so."""
    name = getattr(error, "filename", None)
    found = re.search(r"(?:file|dir|on|from|to) (/.+?): [^:]*\(os error", str(error).partition("\n\n")[0])
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else Path(found[1]) if found else None


def owned(place: Path) -> str:
    """Return whose a path is, and its mode."""
    state = place.stat()
    return f"{place} is of user {user_name(state.st_uid)}, mode {stat.S_IMODE(state.st_mode):o}"


def denied(path: Path | None) -> str:
    """Return whose a path is that may not be read or written, and what to do about it."""
    below = next((p for p in (path, *path.parents) if os.access(p, os.F_OK)), None) if path else None
    if path is None or below is None:
        return "permission denied"
    return (
        f"permission denied: {owned(below)}. In a folder that a team shares, its owner runs chmod -R g+rwX "
        f"and chmod g+s on it, and everyone uses umask 002"
    )


def unlisted(folder: Path) -> str:
    """Return the line about a folder that :func:`walk` does not list."""
    if folder.is_file():
        return f"cannot read {folder}: it is a file, not a folder"
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"cannot read {folder}: {denied(folder)}"
    return (
        f"{folder} is not listed: it lies more than {DEEPEST} folders deep, or behind more than {MOST_LINKS} "
        f"links; whatever made it, delete it"
    )


def user_name(number: int) -> str:
    """Return the name of a user, or the number of one without a name."""
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return str(number)


def share_mode(path: Path, like: Path) -> None:
    """Give a file or folder the permissions and the group of a folder, whatever the umask.

    What the system does not allow, or the file system does not know, is left as it is.
    """
    with suppress(OSError):
        wanted, own = like.stat(), path.stat()
        folder = stat.S_ISDIR(own.st_mode)
        bits = wanted.st_mode & 0o3777 | 0o700 if folder else wanted.st_mode & 0o666 | 0o600
        if own.st_gid != wanted.st_gid:
            with suppress(OSError):
                os.chown(path, -1, wanted.st_gid)
        if stat.S_IMODE(path.stat().st_mode) != bits:
            path.chmod(bits)


def make_folders(folder: Path, root: Path) -> None:
    """Make a folder below a root, and those above it, with the root's permissions.

    A folder right below the root may be a link, to another disk; a link further down may lead anywhere, and
    nothing is written behind it.

    Raises
    ------
    InputError
        If a file, or such a link, has the name of a folder.
    """
    if folder == root:
        return
    make_folders(folder.parent, root)
    if folder.is_symlink() and folder.parent != root:
        raise InputError(
            f"cannot write below {folder}: it is a symbolic link, behind which nothing is written; put a "
            f"folder in its place"
        )
    if folder.is_dir():
        return
    with suppress(FileExistsError):
        folder.mkdir()
        share_mode(folder, root)
    if not folder.is_dir():
        what = "a symbolic link that leads to no folder" if folder.is_symlink() else "a file, not a folder"
        raise InputError(f"cannot write below {folder}: it is {what}")


def resolve(root: Path, path: str) -> Path:
    """Return the file of an object.

    Raises
    ------
    ValueError
        If the path leads out of the root; a commit from elsewhere may name anything.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{path!r} is not the path of an object")
    return root.joinpath(*parts)


def create_file(root: Path, path: str, data: bytes, *, durable: bool) -> None:
    """Create a file below a root so that readers see all of it or nothing, with the root's permissions.

    Unlike :func:`sfm.atomic.atomic_write`, it never replaces a file: of two writers of one name, one fails.

    Parameters
    ----------
    durable : bool
        Return only when its content would survive a power cut.

    Raises
    ------
    FileExistsError
        If there is something of that name; it is left as it is.
    """
    target = resolve(root, path)
    make_folders(target.parent, root)
    # No listing shows a name like this.
    unfinished = target.with_name(f"{target.name}#{secrets.randbits(60)}")
    try:
        with unfinished.open("xb") as file:
            share_mode(unfinished, root)
            file.write(data)
            file.flush()
            if durable:
                sync(unfinished)
        name_if_free(unfinished, target)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def name_if_free(unfinished: Path, target: Path) -> None:
    """Give a file its name, all or nothing, unless the name is taken.

    Raises
    ------
    FileExistsError
        If it is.
    OSError
        ``ENOTSUP`` where the file system can do neither by a hard link nor by an exclusive rename.
    """
    try:
        os.link(unfinished, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        rename_if_free(unfinished, target)


def rename_if_free(source: Path, target: Path) -> None:
    """Rename a file unless the name is taken; Python's own rename would replace what has it."""
    library = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(AT_WORKING_FOLDER, old, AT_WORKING_FOLDER, new, LINUX_NO_REPLACE)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(old, new, MACOS_NO_REPLACE)
    else:
        raise OSError(errno.ENOTSUP, "neither hard links nor exclusive renames", str(target))
    if failed:
        number = ctypes.get_errno()
        unknown = number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
        raise OSError(errno.ENOTSUP if unknown else number, os.strerror(number), str(target))


def sync(path: Path) -> None:
    """Wait until a file or folder would survive a power cut, where the file system can promise that."""
    try:
        # A pipe that somebody put there must not be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        return  # of another user, who has synced it
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def folder_of_store(path: Path, *, create: bool) -> Path:
    """Return the absolute path of a folder, with links followed: what is written is then read there too.

    Raises
    ------
    InputError
        If there is a file of that name, or no folder and it is not to be created.
    OSError
        If it cannot be looked at.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        if not create:
            raise InputError(
                f"no store at {path}: no such folder; create one with "
                f"`sfm extract --store {shlex.quote(str(path))}`"
            ) from None
    except ValueError:
        raise InputError("the path of the store holds a null character") from None
    else:
        if not stat.S_ISDIR(state.st_mode):
            raise InputError(f"no store at {path}: it is a file; give a folder")
    return path.absolute()


def walk(
    root: Path,
    prefix: str,
    unreadable: Callable[[Path], None],
    *,
    follow: bool = True,
    enter: Callable[[str], object] = lambda _: True,
) -> Iterator[LocalFile]:
    """Yield the files and empty folders below a prefix; links are followed, but not in a circle.

    Parameters
    ----------
    unreadable : callable
        Told every folder that may not be listed, is a file, lies deeper than ``DEEPEST``, or is reached by a
        link after ``MOST_LINKS`` others; the others are listed all the same.
    follow : bool
        False yields links as links, whatever is behind them, and the prefix too if it is one.
    enter : callable
        Says of the path of a folder whether anything in it is asked for.
    """
    links = 0

    def below(prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[LocalFile]:
        nonlocal links
        folder = root / prefix
        try:
            state = folder.stat() if follow or not prefix else folder.lstat()
            if stat.S_ISLNK(state.st_mode):
                yield LocalFile(prefix, state.st_size, modified(state), is_file=False, is_link=True)
                return
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return  # not there, or discarded by its writer since it was listed
        except NotADirectoryError:
            if folder.is_file():
                unreadable(folder)
            return
        except OSError as error:
            if error.errno not in UNLISTED:
                raise
            unreadable(folder)
            return
        if not entries:
            yield LocalFile(prefix, 0, modified(state), is_file=False)
        if (state.st_dev, state.st_ino) in above:
            return
        for entry in entries:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                if not follow and entry.is_symlink():
                    own = entry.stat(follow_symlinks=False)
                    yield LocalFile(path, own.st_size, modified(own), is_file=False, is_link=True)
                elif entry.is_dir():
                    if not enter(path):
                        continue
                    links += entry.is_symlink()
                    if len(above) < DEEPEST and (links <= MOST_LINKS or not entry.is_symlink()):
                        yield from below(path, (*above, (state.st_dev, state.st_ino)))
                    elif links <= MOST_LINKS + 1:
                        unreadable(root / path)
                elif entry.is_file():
                    own = entry.stat()
                    yield LocalFile(path, own.st_size, modified(own))
            except FileNotFoundError:
                continue  # a writer at work renamed it since it was listed
            except OSError as error:
                if error.errno not in UNLISTED:
                    raise
                unreadable(root / path)

    yield from below(prefix, ())


def modified(state: os.stat_result) -> datetime.datetime:
    """Return when something was changed last."""
    return datetime.datetime.fromtimestamp(state.st_mtime, datetime.UTC)
