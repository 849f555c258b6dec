"""Connect to the location of a store by its URL, and translate its errors without credentials."""

import datetime
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError
from obstore.store import LocalStore, ObjectStore, from_url

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.stats_store.cloud_providers import explain_cloud_error, require_valid_cloud_environment
from sfm.stats_store.local_files import resolve_store_folder
from sfm.stats_store.system_errors import (
    ERRNO_EXPLANATIONS,
    explain_denied_access,
    get_errno,
    get_error_path,
    is_permission_error,
)
from sfm.text import get_first_error_line, sanitize_line

if TYPE_CHECKING:
    from obstore.store import RetryConfig

LOCATION_KINDS = "a local path, s3://, gs:// or az:// URL"
REMOTE_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")

SHORT_RETRY: "RetryConfig" = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=20),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=1),
        "base": 2,
    },
}
"""For the first request: a location that does not answer is most likely misspelled, so fail soon."""

LONG_RETRY: "RetryConfig" = {
    "max_retries": 10,
    "retry_timeout": datetime.timedelta(minutes=3),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=15),
        "base": 2,
    },
}
"""For later requests: a location that has answered will recover, and hours of work may depend on it."""


def split_url(url: str) -> SplitResult:
    """Split a URL into its components.

    Raises
    ------
    InputError
        If the URL is not valid; the message does not repeat it.
    """
    try:
        return urlsplit(url)
    except ValueError:
        raise InputError(f"the store URL is not valid: use {LOCATION_KINDS}") from None


def redact_url(url: str) -> str:
    """Return the URL of a store without user, password, query and fragment, for logs and cards."""
    if "://" not in url:
        return url
    parts = split_url(url)
    if parts.scheme == "file":
        return f"file://{parts.path}"
    # A password may contain a slash: everything before an @ may belong to it.
    host_and_path = f"{parts.netloc}{parts.path}".rpartition("@")[2]
    return f"{parts.scheme}://{host_and_path.rstrip('/')}"


def parse_local_path(url_or_path: str) -> Path | None:
    """Return the local folder of a URL or path; None for a bucket.

    Raises
    ------
    InputError
        If it is a ``file://`` URL of another machine or with a query or fragment, or a ``~`` path without a
        home folder.
    """
    if url_or_path.startswith(("/", "./", "../", "~")):
        return expand_home(url_or_path)
    parts = split_url(url_or_path)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InputError(
                "the store URL file://... names another machine: write file:///PATH, or PATH alone"
            )
        if parts.query or parts.fragment or url_or_path.endswith(("?", "#")):
            raise InputError(
                f"{redact_url(url_or_path)}...: write %23 for # and %3F for ? in a file:// URL, or PATH alone"
            )
        return Path(unquote(parts.path))
    return None if "://" in url_or_path or parts.scheme in REMOTE_SCHEMES else expand_home(url_or_path)


def make_url_absolute(url: str) -> str:
    """Return the URL of a store with an absolute path if it is local, valid in every working directory."""
    path = None if "://" in url else parse_local_path(url)
    return url if path is None else str(path.absolute())


def connect_object_store(
    url: str, *, create_local_folder: bool = False, use_long_retries: bool = True
) -> ObjectStore:
    """Return an obstore store of the objects below a URL; credentials come from the environment only.

    Parameters
    ----------
    url : str
        A local path, ``file://``, ``s3://``, ``gs://`` or ``az://``.
    create_local_folder : bool
        Create the local folder if it does not exist.
    use_long_retries : bool
        Retry requests for up to three minutes instead of twenty seconds.

    Raises
    ------
    InputError
        If the scheme is unknown, the URL carries credentials or ``..``, or the folder does not exist.
    """
    path = parse_local_path(url)
    if path is not None:
        with translate_errors(str(path)):
            return LocalStore(
                resolve_store_folder(path, allow_missing=create_local_folder), mkdir=create_local_folder
            )
    parts = split_url(url)
    if parts.scheme not in REMOTE_SCHEMES:
        raise InputError(f"unknown store location {parts.scheme}://: use {LOCATION_KINDS}")
    if "@" in url or ":" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"the store URL ({parts.scheme}://...) carries credentials or a query: put credentials in the "
            f"environment, and write {parts.scheme}://BUCKET/PATH"
        )
    if not parts.netloc:
        raise InputError(
            f"the store URL {redact_url(url)} names no bucket: write {parts.scheme}://BUCKET/PATH"
        )
    require_unambiguous_url_path(parts)
    require_valid_cloud_environment(parts.scheme)
    with translate_errors(redact_url(url)):
        return from_url(url, retry_config=LONG_RETRY if use_long_retries else SHORT_RETRY)


def require_unambiguous_url_path(url_parts: SplitResult) -> None:
    """Refuse a path in a bucket that the HTTP client would normalize to another path.

    Raises
    ------
    InputError
        If it has an empty part, ``.`` or ``..``, also in percent encoding.
    """
    inner_path = url_parts.path.removeprefix("/").removesuffix("/")
    if url_parts.path not in ("", "/") and any(
        unquote(part) in ("", ".", "..") for part in inner_path.split("/")
    ):
        raise InputError(
            f"the store URL {redact_url(url_parts.geturl())} has an empty part, . or .. in its path: write "
            f"the whole path, {url_parts.scheme}://BUCKET/PATH"
        )


@contextmanager
def translate_errors(location: str) -> Iterator[None]:
    """Translate errors of obstore and of the system into one-line errors without credentials.

    Raises
    ------
    AccessDeniedError
        If access was denied.
    InputError
        If the location cannot be reached, read or written.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        # The original may quote credentials, so it must not be chained as the cause.
        if is_permission_error(error) or isinstance(error, PermissionDeniedError):
            raise AccessDeniedError(explain_store_error(error, location)) from None
        raise InputError(explain_store_error(error, location)) from None
    except BaseException as error:
        # obstore panics at settings that make an impossible request; the class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(explain_store_error(error, location)) from None


class AccessDeniedError(InputError):
    """Access was denied, perhaps only to one object of many."""


def explain_store_error(error: BaseException, location: str) -> str:
    """Return why a location cannot be used, in one line without credentials."""
    text, errno_value = str(error), get_errno(error)
    if isinstance(error, InvalidPathError):
        match = re.search(r'[Pp]ath "(.*?)"(?= contained|:)', text, flags=re.DOTALL)
        name = sanitize_line(match[1], max_length=200) if match else "unknown"
        return (
            f"cannot use {location}: it holds an object with an invalid name ({name}), at which every "
            f"listing fails: delete it with the tools of the server"
        )
    if errno_value == errno.ENOSPC or "No space left on device" in text:
        return f"no space left on the disk of {location}: free some and run the same command again"
    if "://" not in location or location.startswith("file://"):
        if is_permission_error(error):
            return f"cannot use {location}: {explain_denied_access(get_error_path(error))}"
        reason = ERRNO_EXPLANATIONS.get(errno_value or 0) or get_first_error_line(error)
        return f"cannot use {location}: {reason}"
    return f"cannot use {location}: {explain_cloud_error(error, location.partition(':')[0].lower())}"
