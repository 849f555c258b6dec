"""Garbage collection: delete what no reader can see any more, and nothing else."""

import datetime
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import obstore

from sfm.deletion import raise_unless_gone
from sfm.errors import InputError
from sfm.events import Listener, nobody
from sfm.locking import take_lock
from sfm.paths import is_clutter
from sfm.stats_store.commits import MARK, is_commit
from sfm.stats_store.concurrency import concurrently
from sfm.stats_store.disk import UNFINISHED, LocalFile, denied, local_root, modified, walk
from sfm.stats_store.history import Generation, generations
from sfm.stats_store.location import (
    UnreadableError,
    delete_below,
    list_objects,
    reaching,
)
from sfm.stats_store.store import Store

SAFE_AGE = datetime.timedelta(days=7)

Reason = Literal["replaced", "removed", "never committed", "unfinished write", "abandoned staging"]

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Garbage:
    """Something that no reader can reach.

    Attributes
    ----------
    path : str
        A run, a file of the index or a staging folder, below the store's root.
    reason : {"replaced", "removed", "never committed", "unfinished write", "abandoned staging"}
        The first two had a commit, which is deleted with them. A tombstone is never deleted.
    since : datetime
        When it became garbage: the time of the commit that replaced or removed it; where there is none, the
        time of its newest object, since a writer that is at work keeps adding some.
    objects, size : int
        Number of objects, and bytes.
    commits : tuple of str
        Paths of the commits that refer to it.
    """

    path: str
    reason: Reason
    since: datetime.datetime
    objects: int
    size: int
    commits: tuple[str, ...] = ()


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
        One line each: what could not be read, and so was left with all that it may refer to; what could not
        be deleted.
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
    progress: Listener = nobody,
) -> Collection:
    """Delete runs that no current entry refers to, and unfinished work that was abandoned.

    Every commit is read first. If one cannot be, nothing of its key is deleted. If it is the newest of the
    key, neither is any run that no commit refers to, since the unreadable one may; an older one refers to
    nothing that readers see.
    Data is deleted before the commit that refers to it, so that an interrupted collection is finished by the
    next. What may not be deleted is left, and does not keep the rest from being deleted.

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
    with reaching(store.url):
        runs, index, hidden = stored(store)
    commits = generations(store, progress)
    unreadable = [g for g in commits if g.commit is None]
    notes = [*hidden, *(g.problem for g in unreadable)]
    # Commits that were listed before and are not any more: hidden, or collected by somebody else just now.
    lost = {i.path for i in index if i.is_file and is_commit(i.path)} - {g.path for g in commits}
    uncertain = bool(hidden or lost or any(g.newest for g in unreadable))
    guarded = {run for g in unreadable for run in runs_of(commits, g.key)}
    found = [
        *(
            garbage
            for garbage in unreferenced_runs(runs, index, commits)
            if not (uncertain and garbage.reason == "never committed") and garbage.path not in guarded
        ),
        *(
            Garbage(i.path, "unfinished write", i.modified, 1, i.size)
            for i in (*index, *runs)
            if UNFINISHED.search(i.path) and (i.path.startswith("index/") or i.path.count("/") == 1)
        ),
        *staging_folders(store),
    ]
    time = datetime.datetime.now(datetime.UTC)
    collection = Collection([], [], notes)

    def settle_one(garbage: Garbage) -> tuple[Garbage, bool, str]:
        age = max(time - garbage.since, datetime.timedelta(0))  # the store's clock may be ahead of ours
        due = age >= older_than or (now and bool(garbage.commits))
        try:
            with reaching(store.url), claimed(store, garbage) as free:
                if due and free and not dry_run:
                    delete(store, garbage)
        except UnreadableError as error:
            if local_root(store.objects) is None:
                raise  # a server allows all of it or nothing
            return garbage, False, f"{garbage.path} could not be deleted: {error}"
        return garbage, due and free, ""

    for garbage, gone, problem in concurrently(settle_one, found, progress, "delete", "found"):
        (collection.deleted if gone else collection.kept).append(garbage)
        notes += [problem] if problem else []
    return collection


def runs_of(commits: Sequence[Generation], key: str) -> set[str]:
    """Return the paths of the runs that the commits of a key refer to."""
    return {f"runs/{g.commit.run}" for g in commits if g.key == key and g.commit}


def stored(store: Store) -> tuple[list[LocalFile], list[LocalFile], list[str]]:
    """List the objects of runs and of the index; of a local store also what a killed writer left there.

    Runs come first: one that is committed in between is then found to be referred to.

    Returns
    -------
    list of LocalFile, list of LocalFile
    list of str
        One line per folder that may not be listed.
    """
    root, listed, hidden = local_root(store.objects), [], []
    for prefix in ("runs", "index"):
        if root is None:
            objects = list_objects(store.objects, prefix)
            listed.append([LocalFile(o["path"], o["size"], o["last_modified"]) for o in objects])
        else:
            found = walk(root, prefix, lambda p: hidden.append(f"cannot read {p}: {denied(p)}"))
            listed.append([f for f in found if f.path != prefix])
    return listed[0], listed[1], hidden


def size_and_time(path: Path) -> tuple[int, datetime.datetime] | None:
    """Return size (0 of a folder) and time of change; None of what is gone or may not be seen."""
    try:
        state = path.stat()
    except (FileNotFoundError, PermissionError):
        return None
    return 0 if stat.S_ISDIR(state.st_mode) else state.st_size, modified(state)


def unreferenced_runs(
    runs: Sequence[LocalFile], index: Sequence[LocalFile], commits: Sequence[Generation]
) -> Iterator[Garbage]:
    """Yield the runs that no current commit refers to."""
    objects: dict[str, list[LocalFile]] = defaultdict(list)
    for item in runs:
        if item.path.count("/") > 1 or not item.is_file:
            objects[item.path.split("/")[1]].append(item)
    referring: dict[str, list[Generation]] = defaultdict(list)
    for generation in commits:
        if generation.commit and generation.commit.kind == "entry":
            referring[generation.commit.run].append(generation)
    committed = {item.path: item.modified for item in index}
    for run in sorted({*objects, *referring}):
        items, past = objects[run], referring[run]
        if any(g.state == "current" for g in past):
            continue
        reason: Reason = "never committed"
        times = [item.modified for item in items]
        if past:
            reason = "removed" if past[-1].state == "removed" else "replaced"
            times += [committed[g.path] for g in successors(past, commits) if g.path in committed]
        yield Garbage(
            path=f"runs/{run}",
            reason=reason,
            since=max(times, default=datetime.datetime.now(datetime.UTC)),
            objects=len(items),
            size=sum(item.size for item in items),
            commits=tuple(g.path for g in past),
        )


def successors(past: Sequence[Generation], commits: Sequence[Generation]) -> list[Generation]:
    """Return the commit that followed each of these under its key."""
    return [
        min((g for g in commits if g.key == old.key and g.number > old.number), key=lambda g: g.number)
        for old in past
    ]


def staging_folders(store: Store) -> Iterator[Garbage]:
    """Yield the folders of unfinished extractions; those of a remote store are in its writers' caches."""
    root = local_root(store.objects)
    if root is None or not (root / "staging").is_dir():
        return
    for path in sorted((root / "staging").iterdir()):
        if (path.suffix == ".lock" and path.with_suffix("").exists()) or is_clutter(path.name):
            continue  # deleted together with its folder
        known = [known for file in (path, *path.rglob("*")) if (known := size_and_time(file))]
        if not known:
            continue  # its extraction ended a moment ago
        yield Garbage(
            path=path.relative_to(root).as_posix(),
            reason="abandoned staging",
            since=max(time for _, time in known),
            objects=len(known) - 1,
            size=sum(size for size, _ in known),
        )


@contextmanager
def claimed(store: Store, garbage: Garbage) -> Iterator[bool]:
    """Hold the lock of a staging folder while it is looked at; yields False if an extraction holds it."""
    root = local_root(store.objects)
    lock = (root / garbage.path).with_suffix(".lock") if root else None
    if garbage.reason != "abandoned staging" or lock is None or not lock.exists():
        yield True
        return
    try:
        held = lock.open("r+")
    except PermissionError:
        yield False  # of another user, who may be at work
        return
    with held:
        yield take_lock(held, lock)


def delete(store: Store, garbage: Garbage) -> None:
    """Delete garbage, then the commits that refer to it."""
    root = local_root(store.objects)
    if root and garbage.reason in ("abandoned staging", "unfinished write"):
        path = root / garbage.path
        if path.is_dir():
            shutil.rmtree(path, onerror=raise_unless_gone)
        else:
            path.unlink(missing_ok=True)
        if garbage.reason == "abandoned staging":
            path.with_suffix(".lock").unlink(missing_ok=True)
        return
    delete_below(store.objects, garbage.path)
    for commit in garbage.commits:
        for name in (commit, commit.removesuffix(".json") + MARK):
            with suppress(FileNotFoundError):  # another collection was faster
                obstore.delete(store.objects, name)


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
