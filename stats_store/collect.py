"""Garbage collection: delete what no reader can see any more, and nothing else."""

import datetime
import fcntl
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import obstore
from obstore.store import LocalStore

from sfm.errors import DamageError, InputError
from sfm.stats_store.history import Generation, generations
from sfm.stats_store.location import UNFINISHED, delete_below, list_objects, reaching
from sfm.stats_store.store import MARK, Store

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
    """What a collection deleted (or would delete), and what it left because it is too young or in use."""

    deleted: list[Garbage]
    kept: list[Garbage]


@dataclass(frozen=True)
class Stored:
    """One object of a store; of a local one, a file or an empty folder."""

    path: str
    size: int
    modified: datetime.datetime


def collect(
    store: Store,
    *,
    older_than: datetime.timedelta = SAFE_AGE,
    now: bool = False,
    dry_run: bool = False,
) -> Collection:
    """Delete runs that no current entry refers to, and unfinished work that was abandoned.

    Every commit is read first. If the newest of a key cannot be, nothing is deleted, since it may refer to
    anything; an older one refers to nothing that readers see. Data is deleted before the commit that refers
    to it, so that an interrupted collection is finished by the next.

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

    Returns
    -------
    Collection

    Raises
    ------
    DamageError
        If the newest commit of a key is damaged, or of a schema that this version cannot read.
    InputError
        If the store cannot be reached, or nothing may be deleted there.
    """
    # Runs are listed before commits: one that is committed in between is then found to be referred to.
    with reaching(store.url):
        runs, index = stored(store, "runs"), stored(store, "index")
    commits = generations(store)
    unreadable = [g.problem for g in commits if g.newest and g.commit is None]
    if unreadable:
        raise DamageError(f"{unreadable[0]}; nothing was deleted, since it may refer to anything")
    found = [
        *unreferenced_runs(runs, index, commits),
        *(
            Garbage(i.path, "unfinished write", i.modified, 1, i.size)
            for i in index
            if UNFINISHED.search(i.path)
        ),
        *staging_folders(store),
    ]
    time = datetime.datetime.now(datetime.UTC)
    collection = Collection([], [])
    for garbage in found:
        age = max(time - garbage.since, datetime.timedelta(0))  # the store's clock may be ahead of ours
        due = age >= older_than or (now and bool(garbage.commits))
        with reaching(store.url), claimed(store, garbage) as free:
            if due and free and not dry_run:
                delete(store, garbage)
        (collection.deleted if due and free else collection.kept).append(garbage)
    return collection


def stored(store: Store, prefix: str) -> list[Stored]:
    """List the objects below a prefix; of a local store also what a killed writer left there."""
    root = local_root(store)
    if root is None:
        return [
            Stored(item["path"], item["size"], item["last_modified"])
            for item in list_objects(store.objects, prefix)
        ]
    found = []
    for path in (root / prefix).rglob("*"):
        try:
            if path.is_file() or not any(path.iterdir()):
                found.append(Stored(path.relative_to(root).as_posix(), *size_and_time(path)))
        except FileNotFoundError:
            continue  # a writer at work renamed or discarded it since it was listed
    return found


def size_and_time(path: Path) -> tuple[int, datetime.datetime]:
    """Return size and time of change of a file; a folder has no size."""
    state = path.stat()
    size = state.st_size if path.is_file() else 0
    return size, datetime.datetime.fromtimestamp(state.st_mtime, datetime.UTC)


def local_root(store: Store) -> Path | None:
    """Return the folder of a store on this machine's disks; None for any other."""
    objects = store.objects
    return Path(objects.prefix) if isinstance(objects, LocalStore) and objects.prefix else None


def unreferenced_runs(
    runs: Sequence[Stored], index: Sequence[Stored], commits: Sequence[Generation]
) -> Iterator[Garbage]:
    """Yield the runs that no current commit refers to."""
    objects: dict[str, list[Stored]] = defaultdict(list)
    for item in runs:
        if item.path != "runs/zarr.json":
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
    root = local_root(store)
    if root is None or not (root / "staging").is_dir():
        return
    for path in sorted((root / "staging").iterdir()):
        if path.suffix == ".lock" and path.with_suffix("").exists():
            continue  # deleted together with its folder
        files = [path, *path.rglob("*")]
        known = [size_and_time(file) for file in files if file.exists()]
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
    root = local_root(store)
    lock = (root / garbage.path).with_suffix(".lock") if root else None
    if garbage.reason != "abandoned staging" or lock is None or not lock.exists():
        yield True
        return
    with lock.open("r+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def delete(store: Store, garbage: Garbage) -> None:
    """Delete garbage, then the commits that refer to it."""
    root = local_root(store)
    if root and garbage.reason in ("abandoned staging", "unfinished write"):
        path = root / garbage.path
        if path.is_dir():
            shutil.rmtree(path)
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
