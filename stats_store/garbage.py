"""What no reader of a store can reach, and what must be left alone because it cannot be told."""

import datetime
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from sfm.errors import DamageError, InputError
from sfm.events import ProgressCallback, no_progress
from sfm.paths import is_clutter
from sfm.stats_store.cards import Commit
from sfm.stats_store.commits import is_commit, read_cards
from sfm.stats_store.disk import UNFINISHED, LocalFile, is_denied, local_root, modified, unlisted, walk
from sfm.stats_store.history import Generation, generations
from sfm.stats_store.location import reaching
from sfm.stats_store.objects import RUN, list_objects, read_object
from sfm.stats_store.store import Store
from sfm.stats_store.verified import require_published

Reason = Literal["replaced", "removed", "never committed", "unfinished write", "abandoned staging"]


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
class Listing:
    """The objects of a store; of a local one also what a killed writer left, and nothing behind a link.

    Attributes
    ----------
    runs, index : list of LocalFile
    links : list of str
        Paths of links in the place of a folder or of a file of the index.
    hidden : list of str
        One line per folder that may not be listed.
    """

    runs: list[LocalFile]
    index: list[LocalFile]
    links: list[str]
    hidden: list[str]


def find_garbage(store: Store, progress: ProgressCallback = no_progress) -> tuple[list[Garbage], list[str]]:
    """Return everything that no reader can reach, and one line for all that was left out of it.

    Every commit is read. If one cannot be, no run that others of its key refer to is garbage. If it is the
    newest of the key, neither is any run that it may refer to itself: one without a commit. An older one
    refers to nothing that readers see. A run that is not what a commit says has none: anybody may commit the
    id of one that is being written.

    Readers follow links, by which a store may lie on several disks; what is behind a link is never garbage.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    with reaching(store.url):
        listing = list_store(store)
        staging, passed_over = staging_folders(local_root(store.objects))
    commits = generations(store, progress)
    unreadable = [g for g in commits if g.commit is None]
    # Commits that were listed before and are not any more: hidden, or collected by somebody else just now.
    lost = {i.path for i in listing.index if i.is_file and is_commit(i.path)} - {g.path for g in commits}
    # Behind a link of the index there may be commits that are not there today: a disk that is not mounted.
    hidden = [path for path in listing.links if path.startswith("index")]
    all_known = not (any(g.newest for g in unreadable) or lost or hidden or listing.hidden)
    guarded = runs_of(commits, {g.key for g in unreadable})
    by_path = {g.path: g.commit for g in commits}
    runs = [
        g if not g.objects or is_of(store, g.path, [by_path[p] for p in g.commits]) else without_commit(g)
        for g in unreferenced_runs(listing, commits)
        if g.path not in guarded
    ]
    if not all_known:
        runs = [g for g in runs if g.commits]
    found = [
        *runs,
        *(unfinished_writes(listing) if local_root(store.objects) else ()),
        *staging,
    ]
    links = [f"{p} is a symbolic link: nothing behind it is deleted" for p in (*listing.links, *passed_over)]
    return found, [*listing.hidden, *links, *(g.problem for g in unreadable)]


def runs_of(commits: Sequence[Generation], keys: set[str]) -> set[str]:
    """Return the paths of the runs that the commits of these keys refer to."""
    return {f"runs/{g.commit.run}" for g in commits if g.key in keys and g.commit}


def list_store(store: Store) -> Listing:
    """List the objects of runs and of the index.

    Runs come first: one that is committed in between is then found to be referred to.
    """
    root = local_root(store.objects)
    if root is None:
        runs, index = (
            [LocalFile(o["path"], o["size"], o["last_modified"]) for o in list_objects(store.objects, prefix)]
            for prefix in ("runs", "index")
        )
        return Listing(runs, index, [], [])
    hidden: list[str] = []
    found = [
        list(walk(root, prefix, lambda p: hidden.append(unlisted(p)), follow=False))
        for prefix in ("runs", "index")
    ]
    # Inside a run a link is a part of it, and deleted as a link.
    links = [f.path for f in (*found[0], *found[1]) if f.is_link and not is_inside_run(f.path)]
    runs, index = ([f for f in files if f.path not in ("runs", "index", *links)] for files in found)
    return Listing(runs, index, links, hidden)


def is_of(store: Store, run: str, commits: Sequence[Commit | None]) -> bool:
    """Say whether a run has the cards that one of these commits says, to the byte.

    A writer stores them last, and nobody knows them before; they are also deleted last.
    """
    if not commits:
        return False
    try:
        with reaching(store.url):
            data = read_object(store.objects, f"{run}/zarr.json", bytes)
    except (DamageError, InputError, FileNotFoundError):
        return False
    for commit in commits:
        with suppress(DamageError, InputError):
            if commit is not None:
                require_published(f"{run}/zarr.json", data, commit.objects["zarr.json"])
                read_cards(commit, data)
                return True
    return False


def without_commit(garbage: Garbage) -> Garbage:
    """Return a run as one that was never committed."""
    return replace(garbage, reason="never committed", commits=())


def is_inside_run(path: str) -> bool:
    """Say whether a path is that of something in the folder of a run."""
    return path.startswith("runs/") and path.count("/") > 1


def unreferenced_runs(listing: Listing, commits: Sequence[Generation]) -> Iterator[Garbage]:
    """Yield the runs that no current commit refers to.

    What is not named like a run is none. A run behind a link, and one that a commit behind a link refers to,
    is left out.
    """
    if "runs" in listing.links:
        return
    objects: dict[str, list[LocalFile]] = defaultdict(list)
    for item in listing.runs:
        if is_inside_run(item.path) or not item.is_file:
            objects[item.path.split("/")[1]].append(item)
    referring: dict[str, list[Generation]] = defaultdict(list)
    for generation in commits:
        if generation.commit and generation.commit.kind == "entry":
            referring[generation.commit.run].append(generation)
    committed = {item.path: item.modified for item in listing.index}
    followed_by = {old.path: new.path for old, new in pairwise(commits) if old.key == new.key}
    for run in sorted({*objects, *referring}):
        items, past = objects[run], referring[run]
        linked = f"runs/{run}" in listing.links or any(g.path not in committed for g in past)
        if linked or any(g.state == "current" for g in past) or not RUN.fullmatch(run):
            continue
        reason: Reason = "never committed"
        times = [item.modified for item in items]
        if past:
            reason = "removed" if past[-1].state == "removed" else "replaced"
            times += [committed[path] for g in past if (path := followed_by[g.path]) in committed]
        yield Garbage(
            path=f"runs/{run}",
            reason=reason,
            since=max(times, default=datetime.datetime.now(datetime.UTC)),
            objects=len(items),
            size=sum(item.size for item in items),
            commits=tuple(g.path for g in past),
        )


def unfinished_writes(listing: Listing) -> Iterator[Garbage]:
    """Yield the files that a killed writer left half-written outside of a run."""
    for item in (*listing.index, *listing.runs):
        if UNFINISHED.search(item.path) and not is_inside_run(item.path) and item.is_file:
            yield Garbage(item.path, "unfinished write", item.modified, 1, item.size)


def staging_folders(root: Path | None) -> tuple[list[Garbage], list[str]]:
    """Return the folders of unfinished extractions, and the links in their place, which are left alone.

    Those of a remote store are in its writers' caches.
    """
    found: list[Garbage] = []
    if root is None or not (root / "staging").is_dir():
        return found, []
    if (root / "staging").is_symlink():
        return found, ["staging"]
    links = []
    for path in sorted((root / "staging").iterdir()):
        below = path.relative_to(root).as_posix()
        if is_clutter(path.name):
            continue
        if path.is_symlink():
            links.append(below)
            continue
        if path.suffix == ".lock" and os.path.lexists(path.with_suffix("")):
            continue  # deleted together with its folder
        inside = (root / file.path for file in walk(root, below, lambda _: None, follow=False))
        known = [known for file in {path, *inside} if (known := size_and_time(file))]
        if known:  # otherwise its extraction ended a moment ago
            size, since = sum(size for size, _ in known), max(time for _, time in known)
            found.append(Garbage(below, "abandoned staging", since, len(known) - 1, size))
    return found, links


def size_and_time(path: Path) -> tuple[int, datetime.datetime] | None:
    """Return size (0 of a folder) and time of change; None of what is gone or may not be seen."""
    try:
        state = path.lstat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) or is_denied(error):
            return None
        raise
    return 0 if stat.S_ISDIR(state.st_mode) else state.st_size, modified(state)
