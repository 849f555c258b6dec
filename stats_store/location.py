"""Where a store lives: a URL becomes an object store, and never tells its credentials."""

import contextlib
import datetime
import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
)
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from sfm import deletion
from sfm.errors import DamageError, InputError
from sfm.paths import expand_home, is_clutter
from sfm.stats_store.clouds import reason, require_environment
from sfm.stats_store.concurrency import interruptibly
from sfm.stats_store.disk import (
    UNFINISHED,
    WHY,
    create_file,
    denied,
    folder_of_store,
    is_denied,
    local_root,
    path_of,
    resolve,
    sync,
    system_errno,
    walk,
)
from sfm.text import one_line
from sfm.untrusted import JSON_BYTES, OversizeError, read_file

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import RetryConfig

T = TypeVar("T")

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

READ_AGAIN = (0.1, 0.4, 1.6)
"""Seconds to wait before something that arrived damaged from far away is asked for again."""

DAMAGED = (
    errno.EIO,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENXIO,
)
"""What the system says of one object that cannot be read; others may well be."""


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
        name = one_line(named[1], most=200) if named else "unknown"
        return (
            f"cannot use {place}: somebody made an object there that has no proper name ({name}), and no "
            f"listing gets past it: delete it with the tools of the server"
        )
    if number == errno.ENOSPC or "No space left on device" in text:
        return f"no space left on the disk of {place}: free some and run the same command again"
    if "://" not in place or place.startswith("file://"):
        if is_denied(error):
            return f"cannot use {place}: {denied(path_of(error))}"
        return f"cannot use {place}: {WHY.get(number or 0) or first_line(error)}"
    return f"cannot use {place}: {reason(error, place.partition(':')[0].lower())}"


def first_line(error: BaseException) -> str:
    """Return what an error says, without the debugging detail that follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_remote(objects: ObjectStore) -> bool:
    """Say whether there is a network between us and the objects."""
    return not isinstance(objects, LocalStore | MemoryStore)


def read_object(objects: ObjectStore, path: str, check: Callable[[bytes], T], most: int = JSON_BYTES) -> T:
    """Read an object of at most so many bytes and return what `check` makes of it.

    A larger one is not read. What arrives damaged from a server is asked for again: it may have suffered on
    the way.

    Raises
    ------
    FileNotFoundError
        If there is no such object.
    DamageError
        As `check` raises it, if the object is larger, or if the disk cannot give it back.
    """
    root = local_root(objects)
    if root is not None:
        return check(_read_local(root, path, most))
    if is_remote(objects):
        return interruptibly(lambda: _read_remote(objects, path, check, most))
    return check(_fetch(objects, path, most))


def _read_local(root: Path, path: str, most: int) -> bytes:
    try:
        return read_file(resolve(root, path), most)
    except OversizeError:
        size = resolve(root, path).stat().st_size
        raise DamageError(oversize(path, size, most)) from None
    except OSError as error:
        if error.errno in DAMAGED:
            raise DamageError(f"damaged object {path}: {(error.strerror or '').lower()}") from None
        raise


def _read_remote(objects: ObjectStore, path: str, check: Callable[[bytes], T], most: int) -> T:
    for wait in READ_AGAIN:
        data = _fetch(objects, path, most)
        try:
            return check(data)
        except DamageError:
            time.sleep(wait)
    return check(_fetch(objects, path, most))


def _fetch(objects: ObjectStore, path: str, most: int) -> bytes:
    found = obstore.get(objects, path)  # the answer's head; nothing of the object yet
    if found.meta["size"] > most:
        raise DamageError(oversize(path, found.meta["size"], most))
    return bytes(found.bytes())


def oversize(path: str, size: int, most: int) -> str:
    """Say that an object is too large to be read."""
    return f"damaged object {path}: it has {size} bytes, at most {most} are read"


def list_readable(
    objects: ObjectStore,
    prefix: str = "",
    *,
    follow: bool = True,
    enter: Callable[[str], object] = lambda _: True,
) -> "tuple[list[ObjectMeta], list[Path]]":
    """Return all objects whose path starts with ``prefix/``, and the folders that may not be listed.

    Only a disk has such folders; a server refuses the whole listing. On a disk, folders of which `enter` says
    that nothing in them is asked for are passed over; so is what is behind links, unless they are followed,
    and they count as what may not be listed.
    """
    root = local_root(objects)
    if root is None:
        return list_objects(objects, prefix), []
    unreadable: list[Path] = []
    found = list(walk(root, prefix, unreadable.append, follow=follow, enter=enter))
    unreadable += [root / f.path for f in found if f.is_link]
    listed = [
        {"path": f.path, "size": f.size, "last_modified": f.modified, "e_tag": None, "version": None}
        for f in found
        if f.is_file and not UNFINISHED.search(f.path)
    ]
    return listed, unreadable  # type: ignore[return-value]


def list_objects(objects: ObjectStore, prefix: str = "") -> "list[ObjectMeta]":
    """Return all objects whose path starts with ``prefix/``."""
    return _listing(
        objects, lambda: [item for batch in obstore.list(objects, prefix=prefix) for item in batch]
    )


def is_empty(objects: ObjectStore) -> bool:
    """Say whether there is no object at all; on a disk, nothing but clutter."""
    root = local_root(objects)
    if root is not None:
        return not any(
            found.is_file
            and not UNFINISHED.search(found.path)
            and not any(map(is_clutter, found.path.split("/")))
            for found in walk(root, "", lambda _: None)
        )
    return not _listing(objects, lambda: next(iter(obstore.list(objects, chunk_size=1)), None))


def _listing(objects: ObjectStore, call: Callable[[], T]) -> T:
    """List, again if the answer breaks off; obstore repeats requests that fail, but not these."""
    for wait in READ_AGAIN if is_remote(objects) else ():
        try:
            return interruptibly(call)
        except BaseError as error:
            if "list response" not in str(error):
                raise
            time.sleep(wait)
    return interruptibly(call)


def create_object(objects: ObjectStore, path: str, data: bytes, *, durable: bool = True) -> None:
    """Create an object unless there is one: one writer of many succeeds, and no reader sees a part of it.

    Nothing else writes objects, so nothing that exists is ever overwritten. They go in one request: a writer
    killed between the parts of an upload would leave some that nobody can see.

    Parameters
    ----------
    durable : bool
        On a local disk, return only when it would survive a power cut; otherwise :func:`settle` does that
        for many objects.

    Raises
    ------
    AlreadyExistsError
        If there is one; it may be ours, if the answer to an earlier attempt was lost on the way.
    """
    root = local_root(objects)
    if root is None:
        for wait in READ_AGAIN if is_remote(objects) else ():
            try:
                obstore.put(objects, path, data, mode="create", use_multipart=False)
                return
            except BaseError as error:
                # An answer that broke off, perhaps a refusal; asking again tells. obstore does not.
                if "response body" not in str(error):
                    raise
                time.sleep(wait)
        obstore.put(objects, path, data, mode="create", use_multipart=False)
        return
    try:
        create_file(root, path, data, durable=durable)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{path} already exists") from error
    if durable:
        settle(objects, path)


class OccupiedError(InputError):
    """There is an object of that name already, with other content."""


def write_object(objects: ObjectStore, path: str, data: bytes) -> bool:
    """Create an object, or find it there with the very same bytes; return whether it was not there.

    What is found may be ours, if an answer was lost on the way. Not durable on a disk before :func:`settle`.

    Raises
    ------
    OccupiedError
        If there is one with other content, which stays.
    """

    def create_or_find() -> bool:
        try:
            create_object(objects, path, data, durable=False)
            return True
        except AlreadyExistsError:
            with contextlib.suppress(DamageError, FileNotFoundError):
                if read_object(objects, path, bytes, len(data)) == data:
                    return False
        raise OccupiedError(
            f"{path} exists already with other content, and nothing that exists is overwritten"
        )

    return interruptibly(create_or_find)


def settle(objects: ObjectStore, path: str) -> None:
    """Wait until what was written at or below a path would survive a power cut.

    An object store promises that by itself, and so does nothing here; a disk has to be asked, file by file.
    """
    root = local_root(objects)
    if root is None:
        return
    target = root / path
    above = [folder for folder in target.parents if folder.is_relative_to(root)]
    inside = {root / f.path for f in walk(root, path, lambda _: None, follow=False) if not f.is_link}
    folders = {folder for file in inside for folder in file.parents if folder.is_relative_to(target)}
    whole = (file for file in inside if not UNFINISHED.search(file.name))
    for file in {target, *whole, *folders, *above}:
        sync(file)


def require_writable(objects: ObjectStore) -> None:
    """Find out now, not at the end of hours of work, whether a store on a disk can be added to.

    Raises
    ------
    OSError
        If a folder may not be written, the disk is full, or its file system cannot create files exclusively.
    """
    root = local_root(objects)
    if root is None:
        return
    name = f"index/probe#{secrets.randbits(60)}"
    create_file(root, name, b"", durable=True)
    deletion.delete_below(root, name)
    for folder in (root / "runs", root / "staging", *(root / "index").iterdir()):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


RUN = re.compile(r"[0-9a-f]{32}")
"""What the id of a run looks like; a commit of a stranger may name anything, and so may a listing."""


CARDS = "zarr.json"
"""Object of a run that holds its cards."""


def delete_run(objects: ObjectStore, run: str) -> None:
    """Delete every object of a run; of a local store its folder, in which links are deleted as links.

    The cards go last: while they are there, an interrupted deletion can be told from a run that is being
    written.

    Raises
    ------
    ValueError
        If that is not the id of a run: it could be the path of other runs.
    OSError
        If it is a link, or something may not be listed or deleted.
    """
    if not RUN.fullmatch(run):
        raise ValueError(f"{run!r} is not the id of a run")
    prefix, root = f"runs/{run}", local_root(objects)
    if root is not None:
        # What cannot all be deleted is left whole.
        for _ in walk(root, prefix, _raise_denied, follow=False):
            pass
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in (root / prefix).iterdir():
                with contextlib.suppress(deletion.LinkError):  # a link goes with its folder
                    if path.name != CARDS:
                        deletion.delete_below(root, path.relative_to(root))
        deletion.delete_below(root, prefix)
        return
    paths = [item["path"] for item in list_objects(objects, prefix)]
    cards = f"{prefix}/{CARDS}"
    mine = [path for path in paths if path.startswith(f"{prefix}/") and path != cards]
    for some in (mine, [cards] if cards in paths else []):
        if some:
            obstore.delete(objects, some)


def delete_object(objects: ObjectStore, path: str) -> None:
    """Delete one object, if it is still there; of a local store not through a link.

    Raises
    ------
    OSError
        If it is a link or lies behind one, or may not be deleted.
    """
    root = local_root(objects)
    if root is not None:
        deletion.delete_below(root, path)
        return
    with contextlib.suppress(FileNotFoundError):
        obstore.delete(objects, path)


def _raise_denied(folder: Path) -> None:
    if os.access(folder, os.R_OK | os.X_OK):
        return  # not listed for its depth
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
