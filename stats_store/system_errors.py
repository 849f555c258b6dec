"""Explain errors of the operating system and say what to do about them."""

import errno
import os
import re
import stat
from pathlib import Path

ERRNO_EXPLANATIONS = {
    errno.EROFS: "the file system is read-only",
    errno.EDQUOT: "your disk quota is used up: free some and run the same command again",
    errno.ENAMETOOLONG: "the path is too long for the file system: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ELOOP: "its symbolic links form a cycle",
    errno.EIO: "the disk reports an input/output error: check the disk first",
    errno.ESTALE: "the network share went away (stale file handle): mount it again",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n`",
    errno.ENOTSUP: "its file system has neither hard links nor exclusive renames, without which two writers "
    "overwrite each other: use another disk",
}
"""Explanations of system errors for the user, by errno."""


def get_errno(error: BaseException) -> int | None:
    """Return the errno of an error, also if obstore raised it; None if it has none."""
    number = getattr(error, "errno", None)
    match = re.search(r"\(os error (\d+)\)", str(error))
    return number if isinstance(number, int) else int(match[1]) if match else None


def is_permission_error(error: BaseException) -> bool:
    """Return whether the system refused access."""
    return get_errno(error) in (errno.EACCES, errno.EPERM)


def get_error_path(error: BaseException) -> Path | None:
    """Return the path in an error of the system, also if obstore raised it; None if it has none."""
    name = getattr(error, "filename", None)
    match = re.search(r"(?:file|dir|on|from|to) (/.+?): [^:]*\(os error", str(error).partition("\n\n")[0])
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else Path(match[1]) if match else None


def describe_owner_and_mode(path: Path) -> str:
    """Return the owner and the mode of a path, for messages."""
    state = path.stat()
    return f"{path} is of user {get_user_name(state.st_uid)}, mode {stat.S_IMODE(state.st_mode):o}"


def explain_denied_access(path: Path | None) -> str:
    """Return who owns a path to which access was denied, and what to do about it."""
    existing = next((p for p in (path, *path.parents) if os.access(p, os.F_OK)), None) if path else None
    if existing is None:
        return "permission denied"
    return (
        f"permission denied: {describe_owner_and_mode(existing)}. In a folder that a team shares, its owner "
        f"runs chmod -R g+rwX and chmod g+s on it, and everyone uses umask 002"
    )


def get_user_name(user_id: int) -> str:
    """Return the name of a user, or the id if it has no name."""
    try:
        import pwd

        return pwd.getpwuid(user_id).pw_name
    except (ImportError, KeyError):
        return str(user_id)
