"""Read, list, create and delete the objects of a store; none that exists is ever overwritten."""

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore

from sfm.constrained_types import RUN_ID_PATTERN
from sfm.deletion import LinkError, delete_below
from sfm.errors import DamageError, InputError
from sfm.paths import is_clutter
from sfm.stats_store.concurrency import interruptibly
from sfm.stats_store.disk import UNFINISHED, create_file, local_root, resolve, sync, walk
from sfm.untrusted_files import MAX_JSON_BYTES, OversizeError, read_bounded_file

if TYPE_CHECKING:
    from obstore import ObjectMeta

T = TypeVar("T")

READ_AGAIN = (0.1, 0.4, 1.6)
"""Seconds to wait before something that arrived damaged from far away is asked for again."""

RUN = re.compile(RUN_ID_PATTERN)

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


def is_remote(objects: ObjectStore) -> bool:
    """Say whether there is a network between us and the objects."""
    return not isinstance(objects, LocalStore | MemoryStore)


def read_object(
    objects: ObjectStore, path: str, check: Callable[[bytes], T], most: int = MAX_JSON_BYTES
) -> T:
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
        return read_bounded_file(resolve(root, path), most)
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
    delete_below(root, name)
    for folder in (root / "runs", root / "staging", *(root / "index").iterdir()):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            _raise_denied(folder)


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
        for _ in walk(root, prefix, _require_readable, follow=False):
            pass
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in (root / prefix).iterdir():
                with contextlib.suppress(LinkError):  # a link goes with its folder
                    if path.name != CARDS:
                        delete_below(root, path.relative_to(root))
        delete_below(root, prefix)
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
        delete_below(root, path)
        return
    with contextlib.suppress(FileNotFoundError):
        obstore.delete(objects, path)


def _require_readable(folder: Path) -> None:
    # One that may be read is not listed for its depth.
    if not os.access(folder, os.R_OK | os.X_OK):
        _raise_denied(folder)


def _raise_denied(folder: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
