"""Find garbage: objects that no reader of a store can reach. Objects that may be reachable are kept."""

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
from sfm.paths import is_hidden_or_system_file
from sfm.stats_store.cards import Commit
from sfm.stats_store.commits import is_commit_path, parse_entry_cards
from sfm.stats_store.entry_history import CommitStatus, read_commit_statuses
from sfm.stats_store.folder_walk import (
    ListedPath,
    explain_unlisted_folder,
    get_modified_time,
    walk_store_paths,
)
from sfm.stats_store.local_files import UNFINISHED_FILE_NAME, get_local_root
from sfm.stats_store.location import translate_errors
from sfm.stats_store.objects import RUN_ID_REGEX, list_objects, read_object
from sfm.stats_store.store import Store
from sfm.stats_store.system_errors import is_permission_error
from sfm.stats_store.verified_objects import require_published_bytes

GarbageReason = Literal["replaced", "removed", "never committed", "unfinished write", "abandoned staging"]


@dataclass(frozen=True)
class GarbageItem:
    """A run, file or folder that no reader can reach.

    Attributes
    ----------
    path : str
        A run, a file of the index or a staging folder, below the store's root.
    reason : {"replaced", "removed", "never committed", "unfinished write", "abandoned staging"}
        Replaced and removed runs have commits, which are deleted with them. Tombstones are never deleted.
    garbage_since : datetime
        When it became garbage: the time of the commit that replaced or removed it; without one, the time of
        its newest object, since an active writer keeps adding objects.
    object_count, size_bytes : int
        Number of objects, and bytes.
    commit_paths : tuple of str
        Paths of the commits that refer to it.
    """

    path: str
    reason: GarbageReason
    garbage_since: datetime.datetime
    object_count: int
    size_bytes: int
    commit_paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreListing:
    """The files of a store, also those that killed writers left on a disk, but none behind links.

    Attributes
    ----------
    run_files, index_files : list of ListedPath
    link_paths_outside_runs : list of str
        Paths of links in place of folders, or of files of the index.
    unlisted_folder_notes : list of str
        One line per folder that could not be listed.
    """

    run_files: list[ListedPath]
    index_files: list[ListedPath]
    link_paths_outside_runs: list[str]
    unlisted_folder_notes: list[str]


def find_garbage_and_notes(
    store: Store, progress: ProgressCallback = no_progress
) -> tuple[list[GarbageItem], list[str]]:
    """Return the garbage of a store, and one note about each object that was left out.

    Every commit is read. If one is unreadable, no run that other commits of its key refer to is garbage. If
    it is the newest of its key, no run without a commit is garbage either: the unreadable commit may refer to
    it. A run that contradicts its commit counts as one without: the commit may be forged, and name a run
    that is being written.

    Readers follow links, so that a store may span several disks; objects behind a link are never garbage.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    with translate_errors(store.url):
        listing = list_stored_files(store)
        staging, staging_links = list_staging_folders_and_links(get_local_root(store.objects))
    statuses = read_commit_statuses(store, progress)
    unreadable = [status for status in statuses if status.commit is None]
    # Commits that were listed first and are missing now: hidden, or deleted by another collection.
    known_paths = {status.path for status in statuses}
    missing_paths = {
        f.path for f in listing.index_files if f.is_file and is_commit_path(f.path)
    } - known_paths
    # A link in the index may hide commits today: its disk may not be mounted.
    index_links = [path for path in listing.link_paths_outside_runs if path.startswith("index")]
    has_unknown_commits = (
        any(status.is_newest for status in unreadable)
        or missing_paths
        or index_links
        or listing.unlisted_folder_notes
    )
    protected = list_run_paths_of_keys(statuses, {status.key for status in unreadable})
    commits = {status.path: status.commit for status in statuses}
    runs = [
        run
        if not run.object_count
        or do_run_cards_match_a_commit(store, run.path, [commits[path] for path in run.commit_paths])
        else change_to_never_committed(run)
        for run in find_unreferenced_runs(listing, statuses)
        if run.path not in protected
    ]
    if has_unknown_commits:
        runs = [run for run in runs if run.commit_paths]
    unfinished = find_unfinished_writes(listing) if get_local_root(store.objects) else ()
    notes = [
        *listing.unlisted_folder_notes,
        *(
            f"{path} is a symbolic link: nothing behind it is deleted"
            for path in (*listing.link_paths_outside_runs, *staging_links)
        ),
        *(status.problem for status in unreadable),
    ]
    return [*runs, *unfinished, *staging], notes


def list_run_paths_of_keys(statuses: Sequence[CommitStatus], entry_keys: set[str]) -> set[str]:
    """Return the paths of the runs that the commits of these keys refer to."""
    return {f"runs/{status.commit.run}" for status in statuses if status.key in entry_keys and status.commit}


def list_stored_files(store: Store) -> StoreListing:
    """List the objects of runs and of the index.

    Runs are listed first: the index then lists the commit of a run that is committed in between.
    """
    root = get_local_root(store.objects)
    if root is None:
        runs, index = (
            [
                ListedPath(item["path"], item["size"], item["last_modified"])
                for item in list_objects(store.objects, prefix)
            ]
            for prefix in ("runs", "index")
        )
        return StoreListing(runs, index, [], [])
    unlisted: list[str] = []
    run_files, index_files = (
        list(
            walk_store_paths(
                root,
                prefix,
                lambda folder: unlisted.append(explain_unlisted_folder(folder)),
                follow_links=False,
            )
        )
        for prefix in ("runs", "index")
    )
    # A link inside a run belongs to it, and is deleted as a link.
    links = [f.path for f in (*run_files, *index_files) if f.is_link and not is_inside_run(f.path)]
    runs, index = (
        [f for f in files if f.path not in ("runs", "index", *links)] for files in (run_files, index_files)
    )
    return StoreListing(runs, index, links, unlisted)


def do_run_cards_match_a_commit(store: Store, run_path: str, commits: Sequence[Commit | None]) -> bool:
    """Return whether the cards of a run are, to the byte, those that one of these commits records.

    A writer stores the cards last, and they are deleted last.
    """
    if not commits:
        return False
    try:
        with translate_errors(store.url):
            cards = read_object(store.objects, f"{run_path}/zarr.json", bytes)
    except (DamageError, InputError, FileNotFoundError):
        return False
    for commit in commits:
        with suppress(DamageError, InputError):
            if commit is not None:
                require_published_bytes(f"{run_path}/zarr.json", cards, commit.objects["zarr.json"])
                parse_entry_cards(commit, cards)
                return True
    return False


def change_to_never_committed(garbage: GarbageItem) -> GarbageItem:
    """Return garbage of a run, changed to a run that was never committed."""
    return replace(garbage, reason="never committed", commit_paths=())


def is_inside_run(path: str) -> bool:
    """Return whether a path is below the folder of a run."""
    return path.startswith("runs/") and path.count("/") > 1


def find_unreferenced_runs(listing: StoreListing, statuses: Sequence[CommitStatus]) -> Iterator[GarbageItem]:
    """Yield the runs that no current commit refers to.

    Folders that are not named like a run are skipped, and so are runs behind a link, or with a commit behind
    one.
    """
    if "runs" in listing.link_paths_outside_runs:
        return
    files_by_run: dict[str, list[ListedPath]] = defaultdict(list)
    for file in listing.run_files:
        if is_inside_run(file.path) or not file.is_file:
            files_by_run[file.path.split("/")[1]].append(file)
    statuses_by_run: dict[str, list[CommitStatus]] = defaultdict(list)
    for status in statuses:
        if status.commit and status.commit.kind == "entry":
            statuses_by_run[status.commit.run].append(status)
    commit_times = {file.path: file.modified_time for file in listing.index_files}
    next_paths = {old.path: new.path for old, new in pairwise(statuses) if old.key == new.key}
    for run in sorted({*files_by_run, *statuses_by_run}):
        files, run_statuses = files_by_run[run], statuses_by_run[run]
        is_linked = f"runs/{run}" in listing.link_paths_outside_runs or any(
            s.path not in commit_times for s in run_statuses
        )
        if is_linked or any(s.state == "current" for s in run_statuses) or not RUN_ID_REGEX.fullmatch(run):
            continue
        reason: GarbageReason = "never committed"
        times = [file.modified_time for file in files]
        if run_statuses:
            reason = "removed" if run_statuses[-1].state == "removed" else "replaced"
            times += [
                commit_times[path] for s in run_statuses if (path := next_paths[s.path]) in commit_times
            ]
        yield GarbageItem(
            path=f"runs/{run}",
            reason=reason,
            garbage_since=max(times, default=datetime.datetime.now(datetime.UTC)),
            object_count=len(files),
            size_bytes=sum(file.size_bytes for file in files),
            commit_paths=tuple(s.path for s in run_statuses),
        )


def find_unfinished_writes(listing: StoreListing) -> Iterator[GarbageItem]:
    """Yield the partial files that killed writers left outside of runs."""
    for file in (*listing.index_files, *listing.run_files):
        if UNFINISHED_FILE_NAME.search(file.path) and not is_inside_run(file.path) and file.is_file:
            yield GarbageItem(file.path, "unfinished write", file.modified_time, 1, file.size_bytes)


def list_staging_folders_and_links(root: Path | None) -> tuple[list[GarbageItem], list[str]]:
    """Return the staging folders of a local store, and the links in place of some, which are never deleted.

    The staging folders of a remote store are in the caches of its writers.
    """
    garbage_items: list[GarbageItem] = []
    if root is None or not (root / "staging").is_dir():
        return garbage_items, []
    if (root / "staging").is_symlink():
        return garbage_items, ["staging"]
    links = []
    for path in sorted((root / "staging").iterdir()):
        relative_path = path.relative_to(root).as_posix()
        if is_hidden_or_system_file(path.name):
            continue
        if path.is_symlink():
            links.append(relative_path)
            continue
        if path.suffix == ".lock" and os.path.lexists(path.with_suffix("")):
            continue  # deleted together with its folder
        inner_paths = (
            root / file.path
            for file in walk_store_paths(root, relative_path, lambda _: None, follow_links=False)
        )
        file_stats = [
            file_stats for file in {path, *inner_paths} if (file_stats := get_size_and_time_if_readable(file))
        ]
        if file_stats:  # otherwise its extraction ended a moment ago
            size, since = sum(size for size, _ in file_stats), max(time for _, time in file_stats)
            garbage_items.append(
                GarbageItem(relative_path, "abandoned staging", since, len(file_stats) - 1, size)
            )
    return garbage_items, links


def get_size_and_time_if_readable(path: Path) -> tuple[int, datetime.datetime] | None:
    """Return size (0 for a folder) and time of change of a path; None if it is missing or unreadable."""
    try:
        state = path.lstat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) or is_permission_error(error):
            return None
        raise
    return 0 if stat.S_ISDIR(state.st_mode) else state.st_size, get_modified_time(state)
