"""Where a store lives: a URL becomes an object store, and never tells its credentials."""

import contextlib
import datetime
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError
from obstore.store import LocalStore, ObjectStore, from_url

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.stats_store.clouds import reason, require_environment
from sfm.stats_store.disk import WHY, denied, folder_of_store, is_denied, path_of, system_errno
from sfm.text import sanitize_line, summarize_error

if TYPE_CHECKING:
    from obstore.store import RetryConfig

LOCATIONS = "a local path, s3://, gs:// or az:// URL"
REMOTE = ("s3", "s3a", "gs", "az", "abfs", "abfss")

AT_FIRST: "RetryConfig" = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=20),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=1),
        "base": 2,
    },
}
"""A place that does not answer at all is most likely a mistake in its name: say so soon."""

AT_WORK: "RetryConfig" = {
    "max_retries": 10,
    "retry_timeout": datetime.timedelta(minutes=3),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=15),
        "base": 2,
    },
}
"""A place that has answered before will do so again; hours of work may depend on it."""


def split(url: str) -> SplitResult:
    """Return the parts of a URL.

    Raises
    ------
    InputError
        If it has none; does not repeat it.
    """
    try:
        return urlsplit(url)
    except ValueError:
        raise InputError(f"the store URL is not valid: use {LOCATIONS}") from None


def shown(url: str) -> str:
    """Return a store's URL without user, password, query and fragment, fit for logs and cards."""
    if "://" not in url:
        return url
    parts = split(url)
    if parts.scheme == "file":
        return f"file://{parts.path}"
    # A secret may hold a slash: whatever stands before an @ may be part of one.
    rest = f"{parts.netloc}{parts.path}".rpartition("@")[2]
    return f"{parts.scheme}://{rest.rstrip('/')}"


def local_path(url: str) -> Path | None:
    """Return the folder a URL means, or None if it is not on this machine's disks.

    Raises
    ------
    InputError
        If it is a ``file://`` URL of another machine, or of which a part would be lost; or one of ``~`` where
        there is no home.
    """
    if url.startswith(("/", "./", "../", "~")):
        return expand_home(url)
    parts = split(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InputError(
                "the store URL file://... names another machine: write file:///PATH, or PATH alone"
            )
        if parts.query or parts.fragment or url.endswith(("?", "#")):
            raise InputError(
                f"{shown(url)}...: write %23 for # and %3F for ? in a file:// URL, or PATH alone"
            )
        return Path(unquote(parts.path))
    return None if "://" in url or parts.scheme in REMOTE else expand_home(url)


def absolute_url(url: str) -> str:
    """Return a store's URL with the whole path of a local folder: the same in every working directory."""
    path = None if "://" in url else local_path(url)
    return url if path is None else str(path.absolute())


def connect(url: str, *, create: bool = False, patient: bool = True) -> ObjectStore:
    """Connect to the objects below a URL. Credentials come from the environment alone.

    Parameters
    ----------
    url : str
        A local path, ``file://``, ``s3://``, ``gs://`` or ``az://``.
    create : bool
        Make a local folder that does not exist.
    patient : bool
        Keep asking a server that fails for up to three minutes; otherwise for a few seconds.

    Raises
    ------
    InputError
        If the scheme is unknown, the URL carries credentials or ``..``, or the folder does not exist.
    """
    path = local_path(url)
    if path is not None:
        with reaching(str(path)):
            return LocalStore(folder_of_store(path, create=create), mkdir=create)
    parts = split(url)
    if parts.scheme not in REMOTE:
        raise InputError(f"unknown store location {parts.scheme}://: use {LOCATIONS}")
    if "@" in url or ":" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"the store URL ({parts.scheme}://...) carries credentials or a query: put credentials in the "
            f"environment, and write {parts.scheme}://BUCKET/PATH"
        )
    if not parts.netloc:
        raise InputError(f"the store URL {shown(url)} names no bucket: write {parts.scheme}://BUCKET/PATH")
    require_plain(parts)
    require_environment(parts.scheme)
    with reaching(shown(url)):
        return from_url(url, retry_config=AT_WORK if patient else AT_FIRST)


def require_plain(parts: SplitResult) -> None:
    """Refuse a path in a bucket that would be tidied up into another one on its way there.

    Raises
    ------
    InputError
        If it has an empty part, ``.`` or ``..``, as they are or in percent signs.
    """
    inner = parts.path.removeprefix("/").removesuffix("/")
    if parts.path not in ("", "/") and any(unquote(part) in ("", ".", "..") for part in inner.split("/")):
        raise InputError(
            f"the store URL {shown(parts.geturl())} has an empty part, . or .. in its path: write the whole "
            f"path, {parts.scheme}://BUCKET/PATH"
        )


@contextlib.contextmanager
def reaching(place: str) -> Iterator[None]:
    """Turn what an object store reports into one line without credentials.

    Raises
    ------
    UnreadableError
        If access was denied.
    InputError
        If the place cannot be reached, read or written.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        # The error itself may quote credentials: it must not be shown as a cause either.
        if is_denied(error) or isinstance(error, PermissionDeniedError):
            raise UnreadableError(explained(error, place)) from None
        raise InputError(explained(error, place)) from None
    except BaseException as error:
        # obstore panics where a setting makes a request that cannot be; Python has no name for that class.
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(explained(error, place)) from None


class UnreadableError(InputError):
    """Access was denied: to one object of many, perhaps, that somebody keeps private."""


def explained(error: BaseException, place: str) -> str:
    """Return why a place cannot be used, in one line without credentials."""
    text, number = str(error), system_errno(error)
    if isinstance(error, InvalidPathError):
        named = re.search(r'[Pp]ath "(.*?)"(?= contained|:)', text, flags=re.DOTALL)
        name = sanitize_line(named[1], max_length=200) if named else "unknown"
        return (
            f"cannot use {place}: somebody made an object there that has no proper name ({name}), and no "
            f"listing gets past it: delete it with the tools of the server"
        )
    if number == errno.ENOSPC or "No space left on device" in text:
        return f"no space left on the disk of {place}: free some and run the same command again"
    if "://" not in place or place.startswith("file://"):
        if is_denied(error):
            return f"cannot use {place}: {denied(path_of(error))}"
        return f"cannot use {place}: {WHY.get(number or 0) or summarize_error(error)}"
    return f"cannot use {place}: {reason(error, place.partition(':')[0].lower())}"
