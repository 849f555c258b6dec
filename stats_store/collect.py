"""Garbage collection: delete what no reader can see any more, and nothing else."""

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sfm.deletion import DepthError, LinkError, delete_below
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.locking import open_lock_file, try_lock
from sfm.stats_store.commits import MARK
from sfm.stats_store.concurrency import concurrently
from sfm.stats_store.disk import local_root
from sfm.stats_store.garbage import Garbage, find_garbage
from sfm.stats_store.location import UnreadableError, reaching
from sfm.stats_store.objects import delete_object, delete_run
from sfm.stats_store.store import Store

SAFE_AGE = datetime.timedelta(days=7)

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Collection:
    """What a collection did.

    Attributes
    ----------
    deleted : list of Garbage
        What it deleted, or would delete.
    kept : list of Garbage
        What it left because it is too young, or in use.
    notes : list of str
        One line each: what could not be read, or is a symbolic link, and so was left with all that it may
        refer to; what could not be deleted.
    """

    deleted: list[Garbage]
    kept: list[Garbage]
    notes: list[str] = field(default_factory=list)


def collect(
    store: Store,
    *,
    older_than: datetime.timedelta = SAFE_AGE,
    now: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback = no_progress,
) -> Collection:
    """Delete runs that no current entry refers to, and unfinished work that was abandoned.

    See :func:`~sfm.stats_store.garbage.find_garbage` for what is garbage, and what is left because that
    cannot be told. Data is deleted before the commit that refers to it, so that an interrupted collection is
    finished by the next. What may not be deleted is left, and does not keep the rest from being deleted;
    nothing behind a link is, whoever puts one in the place of a folder meanwhile.

    Parameters
    ----------
    store : Store
    older_than : timedelta
        Leave what became garbage more recently. A run without a commit may be one that is being written:
        choose more than the longest pause of a writer.
    now : bool
        Delete what was replaced or removed whatever its age. Everything else still has to be older than
        `older_than`, because somebody may be writing it.
    dry_run : bool
        Delete nothing; say what would be.
    progress : callable, optional
        Told about every piece of garbage.

    Returns
    -------
    Collection

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    found, notes = find_garbage(store, progress)
    time = datetime.datetime.now(datetime.UTC)
    collection = Collection([], [], notes)

    def settle_one(garbage: Garbage) -> tuple[Garbage, bool, str]:
        age = max(time - garbage.since, datetime.timedelta(0))  # the store's clock may be ahead of ours
        due = age >= older_than or (now and bool(garbage.commits))
        try:
            with reaching(store.url), claimed(store, garbage) as free:
                problem = delete(store, garbage) if due and free and not dry_run else ""
        except UnreadableError as error:
            if local_root(store.objects) is None:
                raise  # a server allows all of it or nothing
            problem = f"{garbage.path} could not be deleted: {error}"
        return garbage, due and not problem and free, problem

    for garbage, gone, problem in concurrently(settle_one, found, progress, "delete", "found"):
        (collection.deleted if gone else collection.kept).append(garbage)
        notes += [problem] if problem else []
    return collection


@contextmanager
def claimed(store: Store, garbage: Garbage) -> Iterator[bool]:
    """Hold the lock of a staging folder while it is looked at; yields False if an extraction holds it."""
    root = local_root(store.objects)
    lock = root / f"{garbage.path}.lock" if root else None
    if garbage.reason != "abandoned staging" or lock is None or not os.path.lexists(lock):
        yield True
        return
    try:
        held = open_lock_file(lock)
    except (OSError, InputError):
        yield False  # of another user, who may be at work; or no file
        return
    with held:
        yield try_lock(held, lock)


def delete(store: Store, garbage: Garbage) -> str:
    """Delete garbage, then the commits that refer to it; return why it could not be, or nothing."""
    root = local_root(store.objects)
    try:
        if root and garbage.reason == "abandoned staging":
            delete_below(root, garbage.path)
            delete_below(root, f"{garbage.path}.lock")
        elif garbage.reason == "unfinished write":
            delete_object(store.objects, garbage.path)
        else:
            # Where the listing found nothing, somebody may have begun to write since.
            if garbage.objects:
                delete_run(store.objects, garbage.path.removeprefix("runs/"))
            for commit in garbage.commits:
                for path in (commit, commit.removesuffix(".json") + MARK):
                    delete_object(store.objects, path)
    except LinkError as error:
        return f"{garbage.path} could not be deleted: {error.filename} is a symbolic link"
    except DepthError:
        return f"{garbage.path} could not be deleted: it holds folders too deep in one another; use rm -r"
    return ""


def parse_age(text: str) -> datetime.timedelta:
    """Return the duration that ``7d``, ``12h``, ``30m``, ``90s``, ``2w`` or ``0`` means.

    Raises
    ------
    InputError
        If it means none.
    """
    parts = re.fullmatch(r"(\d{1,6})([smhdw])", "0s" if text == "0" else text)
    if parts is None:
        raise InputError(
            f"{text!r} is not a duration: write a number and a unit, as in 90s, 30m, 12h, 7d, 2w"
        )
    return datetime.timedelta(**{UNITS[parts[2]]: int(parts[1])})
