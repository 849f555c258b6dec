"""Where a store lives: a URL becomes an object store, and never tells its credentials."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from sfm.errors import InputError

REMOTE = ("s3", "s3a", "gs", "az", "abfs", "abfss")


def shown(url: str) -> str:
    """Return a store's URL without user, password, query and fragment, fit for logs and cards."""
    parts = urlsplit(url)
    if parts.scheme not in REMOTE:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def local_path(url: str) -> Path | None:
    """Return the folder a URL means, or None if it is not on this machine's disks."""
    scheme = urlsplit(url).scheme
    if scheme == "file":
        return Path(urlsplit(url).path)
    return None if "://" in url else Path(url).expanduser()


def connect(url: str, *, create: bool = False) -> ObjectStore:
    """Connect to the objects below a URL. Credentials come from the environment alone.

    Parameters
    ----------
    url : str
        A local path, ``file://``, ``s3://``, ``gs://`` or ``az://``.
    create : bool
        Make a local folder that does not exist.

    Raises
    ------
    InputError
        If the scheme is unknown, the URL carries credentials, or the folder does not exist.
    """
    path = local_path(url)
    if path is not None:
        if not create and not path.is_dir():
            raise InputError(
                f"no store at {path}: no such folder; create one with `sfm extract --store {path}`"
            )
        try:
            return LocalStore(path.absolute(), mkdir=create)
        except (BaseError, OSError) as error:
            raise InputError(f"cannot use {path} as a store: {first_line(error)}") from error
    parts = urlsplit(url)
    if parts.scheme not in REMOTE:
        raise InputError(
            f"unknown store location {parts.scheme}://: use a local path, s3://, gs:// or az:// URL"
        )
    if parts.username or parts.password or parts.query:
        raise InputError(
            f"the store URL {shown(url)} carries credentials or a query: put credentials in the environment"
        )
    return from_url(url)


def first_line(error: BaseException) -> str:
    """Return what an error says, without the debugging detail that follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def delete_below(objects: ObjectStore, prefix: str) -> int:
    """Delete every object whose path starts with ``prefix/``.

    Returns
    -------
    int
        How many were deleted.
    """
    paths = [item["path"] for batch in obstore.list(objects, prefix=prefix) for item in batch]
    if paths:
        obstore.delete(objects, paths)
    if isinstance(objects, LocalStore) and objects.prefix:
        # Only a disk has folders; an empty one would look like a run to a person.
        shutil.rmtree(Path(objects.prefix) / prefix, ignore_errors=True)
    return len(paths)
