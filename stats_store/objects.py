"""Read, list, create and delete the objects of a store; existing objects are never overwritten."""

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
from sfm.deletion import DeletionThroughLinkError, delete_without_following_links
from sfm.errors import DamageError, InputError
from sfm.paths import is_hidden_or_system_file
from sfm.stats_store.concurrency import call_interruptibly
from sfm.stats_store.folder_walk import walk_store_paths
from sfm.stats_store.local_files import (
    UNFINISHED_FILE_NAME,
    create_file_exclusively,
    fsync_if_supported,
    get_local_root,
    resolve_object_path,
)
from sfm.untrusted_files import MAX_JSON_BYTES, OversizeError, read_bounded_file

if TYPE_CHECKING:
    from obstore import ObjectMeta

Parsed = TypeVar("Parsed")

RETRY_DELAYS = (0.1, 0.4, 1.6)
"""Seconds to wait before each retry of an answer that arrived damaged from a server."""

RUN_ID_REGEX = re.compile(RUN_ID_PATTERN)

DAMAGE_ERRNOS = (
    errno.EIO,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENXIO,
)
"""Errors that concern one object only: others can still be read."""


def is_remote_store(objects: ObjectStore) -> bool:
    """Return whether the objects are on a server, not on a disk or in memory."""
    return not isinstance(objects, LocalStore | MemoryStore)


def read_object(
    objects: ObjectStore, path: str, parse: Callable[[bytes], Parsed], max_bytes: int = MAX_JSON_BYTES
) -> Parsed:
    """Read an object and return `parse(data)`; the object is refused unread if it exceeds `max_bytes`.

    An object that arrives damaged from a server is requested again: it may have been damaged in transit.

    Raises
    ------
    FileNotFoundError
        If there is no such object.
    DamageError
        If `parse` raises it, the object is too large, or the disk cannot read it.
    """
    root = get_local_root(objects)
    if root is not None:
        return parse(_read_local_object(root, path, max_bytes))
    if is_remote_store(objects):
        return call_interruptibly(lambda: _read_remote_with_retries(objects, path, parse, max_bytes))
    return parse(_fetch_object(objects, path, max_bytes))


def _read_local_object(root: Path, path: str, max_bytes: int) -> bytes:
    try:
        return read_bounded_file(resolve_object_path(root, path), max_bytes)
    except OversizeError:
        size = resolve_object_path(root, path).stat().st_size
        raise DamageError(describe_oversized_object(path, size, max_bytes)) from None
    except OSError as error:
        if error.errno in DAMAGE_ERRNOS:
            raise DamageError(f"damaged object {path}: {(error.strerror or '').lower()}") from None
        raise


def _read_remote_with_retries(
    objects: ObjectStore, path: str, parse: Callable[[bytes], Parsed], max_bytes: int
) -> Parsed:
    for delay in RETRY_DELAYS:
        data = _fetch_object(objects, path, max_bytes)
        try:
            return parse(data)
        except DamageError:
            time.sleep(delay)
    return parse(_fetch_object(objects, path, max_bytes))


def _fetch_object(objects: ObjectStore, path: str, max_bytes: int) -> bytes:
    response = obstore.get(objects, path)  # only the headers yet
    if response.meta["size"] > max_bytes:
        raise DamageError(describe_oversized_object(path, response.meta["size"], max_bytes))
    return bytes(response.bytes())


def describe_oversized_object(path: str, size_bytes: int, max_bytes: int) -> str:
    """Return the message about an object that is too large to be read."""
    return f"damaged object {path}: it has {size_bytes} bytes, at most {max_bytes} are read"


def list_objects_and_unlisted_folders(
    objects: ObjectStore,
    prefix: str = "",
    *,
    follow_links: bool = True,
    should_enter_folder: Callable[[str], object] = lambda _: True,
) -> "tuple[list[ObjectMeta], list[Path]]":
    """Return all objects whose path starts with ``prefix/``, and the folders that could not be listed.

    Only a disk has such folders; a server refuses the whole listing. On a disk, folders for whose path
    `should_enter_folder` returns false are skipped. Links are returned as folders that could not be listed,
    unless they are followed.
    """
    root = get_local_root(objects)
    if root is None:
        return list_objects(objects, prefix), []
    unreadable: list[Path] = []
    files = list(
        walk_store_paths(
            root,
            prefix,
            unreadable.append,
            follow_links=follow_links,
            should_enter_folder=should_enter_folder,
        )
    )
    unreadable += [root / f.path for f in files if f.is_link]
    listed = [
        {
            "path": f.path,
            "size": f.size_bytes,
            "last_modified": f.modified_time,
            "e_tag": None,
            "version": None,
        }
        for f in files
        if f.is_file and not UNFINISHED_FILE_NAME.search(f.path)
    ]
    return listed, unreadable  # type: ignore[return-value]


def list_objects(objects: ObjectStore, prefix: str = "") -> "list[ObjectMeta]":
    """Return all objects whose path starts with ``prefix/``."""
    return _request_listing_with_retries(
        objects, lambda: [item for batch in obstore.list(objects, prefix=prefix) for item in batch]
    )


def is_empty_location(objects: ObjectStore) -> bool:
    """Return whether a location holds no object; on a disk, files like ``.DS_Store`` do not count."""
    root = get_local_root(objects)
    if root is not None:
        return not any(
            file.is_file
            and not UNFINISHED_FILE_NAME.search(file.path)
            and not any(map(is_hidden_or_system_file, file.path.split("/")))
            for file in walk_store_paths(root, "", lambda _: None)
        )
    return not _request_listing_with_retries(
        objects, lambda: next(iter(obstore.list(objects, chunk_size=1)), None)
    )


def _request_listing_with_retries(objects: ObjectStore, request: Callable[[], Parsed]) -> Parsed:
    """List objects, and retry if the response is cut off: obstore does not retry these."""
    for delay in RETRY_DELAYS if is_remote_store(objects) else ():
        try:
            return call_interruptibly(request)
        except BaseError as error:
            if "list response" not in str(error):
                raise
            time.sleep(delay)
    return call_interruptibly(request)


def create_object(objects: ObjectStore, path: str, data: bytes, *, sync_to_disk: bool = True) -> None:
    """Create an object atomically, unless its path is taken: exactly one of several writers succeeds.

    No other function writes objects, so no object is ever overwritten. Every object is sent in one request: a
    writer killed during a multipart upload would leave invisible parts behind.

    Parameters
    ----------
    sync_to_disk : bool
        On a local disk, return only once the object would survive a power cut;
        :func:`sync_objects_to_disk` does that later for many objects together.

    Raises
    ------
    AlreadyExistsError
        If the path is taken, perhaps by this writer, if the answer to an earlier attempt was lost.
    """
    root = get_local_root(objects)
    if root is None:
        for delay in RETRY_DELAYS if is_remote_store(objects) else ():
            try:
                obstore.put(objects, path, data, mode="create", use_multipart=False)
                return
            except BaseError as error:
                # The response was cut off and may have been a refusal: obstore does not retry these.
                if "response body" not in str(error):
                    raise
                time.sleep(delay)
        obstore.put(objects, path, data, mode="create", use_multipart=False)
        return
    try:
        create_file_exclusively(root, path, data, sync_to_disk=sync_to_disk)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{path} already exists") from error
    if sync_to_disk:
        sync_objects_to_disk(objects, path)


class ObjectExistsError(InputError):
    """The path of an object is taken by one with other content."""


def create_object_unless_identical(objects: ObjectStore, path: str, data: bytes) -> bool:
    """Create an object unless one with the same bytes exists; return whether it was created.

    An existing one may be this writer's, if an answer was lost. On a disk, the object is durable only after
    :func:`sync_objects_to_disk`.

    Raises
    ------
    ObjectExistsError
        If the existing object has other content; it is left unchanged.
    """

    def create_or_find() -> bool:
        try:
            create_object(objects, path, data, sync_to_disk=False)
            return True
        except AlreadyExistsError:
            with contextlib.suppress(DamageError, FileNotFoundError):
                if read_object(objects, path, bytes, len(data)) == data:
                    return False
        raise ObjectExistsError(f"{path} exists already with other content, and is not overwritten")

    return call_interruptibly(create_or_find)


def sync_objects_to_disk(objects: ObjectStore, path: str) -> None:
    """Sync the objects at and below a path to disk, so that they survive a power cut.

    Does nothing on a server, which guarantees that by itself.
    """
    root = get_local_root(objects)
    if root is None:
        return
    target = root / path
    parents = [folder for folder in target.parents if folder.is_relative_to(root)]
    inside = {
        root / f.path
        for f in walk_store_paths(root, path, lambda _: None, follow_links=False)
        if not f.is_link
    }
    folders = {folder for file in inside for folder in file.parents if folder.is_relative_to(target)}
    finished = (file for file in inside if not UNFINISHED_FILE_NAME.search(file.name))
    for file in {target, *finished, *folders, *parents}:
        fsync_if_supported(file)


def require_writable_local_store(objects: ObjectStore) -> None:
    """Check that a store on a disk can be written, before hours of work depend on it.

    Raises
    ------
    OSError
        If a folder is not writable, the disk is full, or its file system cannot create files exclusively.
    """
    root = get_local_root(objects)
    if root is None:
        return
    name = f"index/probe#{secrets.randbits(60)}"
    create_file_exclusively(root, name, b"", sync_to_disk=True)
    delete_without_following_links(root, name)
    for folder in (root / "runs", root / "staging", *(root / "index").iterdir()):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            _raise_permission_error(folder)


CARDS_NAME = "zarr.json"
"""Name of the object of a run that holds its cards."""


def delete_run(objects: ObjectStore, run_id: str) -> None:
    """Delete all objects of a run; links in the folder of a local run are deleted as links.

    The cards are deleted last: an interrupted deletion then differs from a run that is being written.

    Raises
    ------
    ValueError
        If `run_id` is not a run id: it could be the path of other runs.
    OSError
        If the run is a link, or part of it cannot be listed or deleted.
    """
    if not RUN_ID_REGEX.fullmatch(run_id):
        raise ValueError(f"{run_id!r} is not the id of a run")
    prefix, root = f"runs/{run_id}", get_local_root(objects)
    if root is not None:
        # A run of which a part cannot be deleted is left complete.
        for _ in walk_store_paths(root, prefix, _require_readable_folder, follow_links=False):
            pass
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in (root / prefix).iterdir():
                with contextlib.suppress(DeletionThroughLinkError):  # a link goes with its folder
                    if path.name != CARDS_NAME:
                        delete_without_following_links(root, path.relative_to(root))
        delete_without_following_links(root, prefix)
        return
    all_paths = [item["path"] for item in list_objects(objects, prefix)]
    cards = f"{prefix}/{CARDS_NAME}"
    other_paths = [path for path in all_paths if path.startswith(f"{prefix}/") and path != cards]
    for paths in (other_paths, [cards] if cards in all_paths else []):
        if paths:
            obstore.delete(objects, paths)


def delete_object(objects: ObjectStore, path: str) -> None:
    """Delete an object, if it exists; a local one is never deleted through a link.

    Raises
    ------
    OSError
        If it is a link or behind one, or cannot be deleted.
    """
    root = get_local_root(objects)
    if root is not None:
        delete_without_following_links(root, path)
        return
    with contextlib.suppress(FileNotFoundError):
        obstore.delete(objects, path)


def _require_readable_folder(folder: Path) -> None:
    # A readable folder was refused because of its depth.
    if not os.access(folder, os.R_OK | os.X_OK):
        _raise_permission_error(folder)


def _raise_permission_error(folder: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
