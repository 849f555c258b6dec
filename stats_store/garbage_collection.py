"""Garbage collection: delete the objects that no reader can reach."""

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sfm.deletion import DeletionDepthError, DeletionThroughLinkError, delete_without_following_links
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.locking import open_lock_file, try_lock_if_still_at_path
from sfm.stats_store.commits import PUBLISHED_SUFFIX
from sfm.stats_store.concurrency import map_concurrently
from sfm.stats_store.garbage import GarbageItem, find_garbage_and_notes
from sfm.stats_store.local_files import get_local_root
from sfm.stats_store.location import AccessDeniedError, translate_errors
from sfm.stats_store.objects import delete_object, delete_run
from sfm.stats_store.store import Store

DEFAULT_MIN_AGE = datetime.timedelta(days=7)

DURATION_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class GarbageCollectionResult:
    """The result of a garbage collection.

    Attributes
    ----------
    deleted : list of GarbageItem
        Garbage that was deleted, or would be.
    retained : list of GarbageItem
        Garbage that was left because it is too young or in use.
    notes : list of str
        One line per object that is unreadable or a symbolic link, which was left with everything that it
        may refer to, or that could not be deleted.
    """

    deleted: list[GarbageItem]
    retained: list[GarbageItem]
    notes: list[str] = field(default_factory=list)


def collect_garbage(
    store: Store,
    *,
    min_age: datetime.timedelta = DEFAULT_MIN_AGE,
    delete_replaced_now: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback = no_progress,
) -> GarbageCollectionResult:
    """Delete runs that no current entry refers to, and abandoned unfinished work.

    :func:`~sfm.stats_store.garbage.find_garbage_and_notes` decides which objects are garbage. Data is deleted
    before the commits that refer to it, so that the next collection finishes an interrupted one. An object
    that cannot be deleted is left and does not stop the others. Nothing behind a link is deleted, even if a
    link replaces a folder during the collection.

    Parameters
    ----------
    store : Store
    min_age : timedelta
        Leave objects that became garbage more recently. A run without a commit may be one that is being
        written: choose more than the longest pause of a writer.
    delete_replaced_now : bool
        Delete replaced and removed runs of any age. Everything else must be older than `min_age`,
        because it may be being written.
    dry_run : bool
        Delete nothing; report what would be deleted.
    progress : callable, optional
        Called after every piece of garbage.

    Returns
    -------
    GarbageCollectionResult

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    garbage_items, notes = find_garbage_and_notes(store, progress)
    current_time = datetime.datetime.now(datetime.UTC)
    collection = GarbageCollectionResult([], [], notes)

    def collect_one(garbage: GarbageItem) -> tuple[GarbageItem, bool, str]:
        age = max(
            current_time - garbage.garbage_since, datetime.timedelta(0)
        )  # the store's clock may be ahead of ours
        is_due = age >= min_age or (delete_replaced_now and bool(garbage.commit_paths))
        try:
            with translate_errors(store.url), try_lock_if_staging_folder(store, garbage) as is_free:
                problem = (
                    delete_garbage_or_explain(store, garbage) if is_due and is_free and not dry_run else ""
                )
        except AccessDeniedError as error:
            if get_local_root(store.objects) is None:
                raise  # a server denies access to everything or nothing
            problem = f"{garbage.path} could not be deleted: {error}"
        return garbage, is_due and not problem and is_free, problem

    for garbage, is_deleted, problem in map_concurrently(
        collect_one, garbage_items, progress, "delete", "found"
    ):
        (collection.deleted if is_deleted else collection.retained).append(garbage)
        notes += [problem] if problem else []
    return collection


@contextmanager
def try_lock_if_staging_folder(store: Store, garbage: GarbageItem) -> Iterator[bool]:
    """Lock a staging folder while it is deleted; yield False if an extraction holds the lock."""
    root = get_local_root(store.objects)
    lock_path = root / f"{garbage.path}.lock" if root else None
    if garbage.reason != "abandoned staging" or lock_path is None or not os.path.lexists(lock_path):
        yield True
        return
    try:
        lock_file = open_lock_file(lock_path)
    except (OSError, InputError):
        yield False  # it belongs to another user, who may be extracting, or is no file
        return
    with lock_file:
        yield try_lock_if_still_at_path(lock_file, lock_path)


def delete_garbage_or_explain(store: Store, garbage: GarbageItem) -> str:
    """Delete garbage, then the commits that refer to it; return why it could not be deleted, or ""."""
    root = get_local_root(store.objects)
    try:
        if root and garbage.reason == "abandoned staging":
            delete_without_following_links(root, garbage.path)
            delete_without_following_links(root, f"{garbage.path}.lock")
        elif garbage.reason == "unfinished write":
            delete_object(store.objects, garbage.path)
        else:
            # A run without objects in the listing may have been started since.
            if garbage.object_count:
                delete_run(store.objects, garbage.path.removeprefix("runs/"))
            for commit in garbage.commit_paths:
                for path in (commit, commit.removesuffix(".json") + PUBLISHED_SUFFIX):
                    delete_object(store.objects, path)
    except DeletionThroughLinkError as error:
        return f"{garbage.path} could not be deleted: {error.filename} is a symbolic link"
    except DeletionDepthError:
        return f"{garbage.path} could not be deleted: it holds folders too deep in one another; use rm -r"
    return ""


def parse_duration(text: str) -> datetime.timedelta:
    """Parse a duration such as ``7d``, ``12h``, ``30m``, ``90s``, ``2w`` or ``0``.

    Raises
    ------
    InputError
        If it is not a duration.
    """
    match = re.fullmatch(r"(\d{1,6})([smhdw])", "0s" if text == "0" else text)
    if match is None:
        raise InputError(
            f"{text!r} is not a duration: write a number and a unit, as in 90s, 30m, 12h, 7d, 2w"
        )
    return datetime.timedelta(**{DURATION_UNITS[match[2]]: int(match[1])})
