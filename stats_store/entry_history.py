"""The history of keys: which commits were replaced or removed; and the removal of entries."""

import datetime
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfm.errors import DamageError, InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.cards import Commit, DatasetCard, Summary
from sfm.stats_store.commits import get_next_generation, parse_entry_cards, parse_generation
from sfm.stats_store.concurrency import map_concurrently
from sfm.stats_store.dataset_names import PinnedName, split_pinned_name
from sfm.stats_store.entry_selection import describe_entry, filter_summaries_or_raise
from sfm.stats_store.location import AccessDeniedError, translate_errors
from sfm.stats_store.publication import create_or_get_commit
from sfm.stats_store.schema import UpgradeNeededError
from sfm.stats_store.store import Store
from sfm.stats_store.verified_objects import read_published_object

LOG = logging.getLogger(__name__)

CommitState = Literal["current", "replaced", "removed", "tombstone", "unreadable"]


@dataclass(frozen=True)
class CommitStatus:
    """A commit of a key and its state.

    Attributes
    ----------
    key : str
        Backbone hash, dataset fingerprint and options digest, as in the path below ``index/``.
    generation : int
        Generation: rises by one with every commit of the key.
    path : str
        Path of the commit object.
    commit : Commit or None
        None if it is damaged, or of a schema that this version cannot read; `problem` says why.
    state : {"current", "replaced", "removed", "tombstone", "unreadable"}
        Readers see it, a later generation replaced it, a later tombstone hides it, it is a tombstone itself,
        or it cannot be read.
    is_newest : bool
        Whether it is the latest generation of its key.
    """

    key: str
    generation: int
    path: str
    commit: Commit | None
    problem: str
    state: CommitState
    is_newest: bool

    @property
    def summary(self) -> Summary | None:
        """The summary of the entry that was published, or removed."""
        return self.commit.summary if self.commit else None

    @property
    def run_size_bytes(self) -> int:
        """Size of all objects of the run."""
        return sum(record.size for record in self.commit.objects.values()) if self.commit else 0


def read_commit_statuses(store: Store, progress: ProgressCallback = no_progress) -> list[CommitStatus]:
    """Read every commit of a store, with its state; by key, oldest first.

    One listing and one request per commit. Commits that garbage collection has deleted are not included.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    paths_by_key = store.list_commit_paths_by_key()
    all_paths = [path for paths in paths_by_key.values() for path in paths]
    results = map_concurrently(
        lambda path: read_commit_or_problem(store, path), all_paths, progress, "read", "commits"
    )
    results_by_path = dict(zip(all_paths, results, strict=True))
    statuses = []
    for key, paths in paths_by_key.items():
        commits = [results_by_path[path][0] for path in paths]
        for path, commit, state in zip(paths, commits, classify_commits_of_key(commits), strict=True):
            problem, is_newest = results_by_path[path][1], path == paths[-1]
            statuses.append(
                CommitStatus(key, parse_generation(path), path, commit, problem, state, is_newest)
            )
    return statuses


def read_commit_or_problem(store: Store, commit_path: str) -> tuple[Commit | None, str]:
    """Return a commit and "", or None and why it cannot be read."""
    try:
        return store.read_commit(commit_path), ""
    except (DamageError, UpgradeNeededError, AccessDeniedError) as error:
        return None, str(error)


def classify_commits_of_key(commits_oldest_first: Sequence[Commit | None]) -> list[CommitState]:
    """Return the state of every commit of a key, oldest first; None is a commit that cannot be read."""
    last = len(commits_oldest_first) - 1
    tombstones = {i for i, commit in enumerate(commits_oldest_first) if commit and commit.kind == "tombstone"}
    last_tombstone = max(tombstones, default=-1)

    def classify_commit(i: int) -> CommitState:
        if commits_oldest_first[i] is None:
            return "unreadable"
        if i in tombstones:
            return "tombstone"
        if i < last_tombstone:
            return "removed"
        return "current" if i == last else "replaced"

    return [classify_commit(i) for i in range(len(commits_oldest_first))]


def list_visible_and_pinned_summaries(
    store: Store, pinned_name: PinnedName, progress: ProgressCallback = no_progress
) -> list[Summary]:
    """Return the summaries among which a dataset name is to be looked up.

    These are all visible entries, and replaced ones that ``NAME@DIGEST`` pins: a pin keeps its meaning when
    the entry is replaced, until the replaced run is collected. Removed entries are not included.

    Parameters
    ----------
    store : Store
    pinned_name : str
        ``NAME`` or ``NAME@DIGEST``. Replaced generations are read only for a digest that no visible entry
        has.
    """
    visible = store.list_summaries(progress)
    name, pin = split_pinned_name(pinned_name, {summary.dataset for summary in visible})
    if not pin or pin == "tuning" or any(matches_pin(summary, name, pin) for summary in visible):
        return visible
    statuses = read_commit_statuses(store, progress)
    replaced = [status.summary for status in statuses if status.state == "replaced"]
    # Content may have been replaced by the same content: one of its generations is enough.
    pinned = {(s.key, s.entry_digest): s for s in replaced if s and matches_pin(s, name, pin)}
    return visible + list(pinned.values())


def matches_pin(summary: Summary, dataset_name: str, digest_prefix: str) -> bool:
    """Return whether ``NAME@DIGEST`` can name an entry."""
    return summary.dataset == dataset_name and summary.entry_digest.startswith(digest_prefix)


def remove_entry(store: Store, summary: Summary) -> Commit:
    """Commit a tombstone: readers no longer see the entry, its bytes stay until garbage collection.

    Parameters
    ----------
    store : Store
    summary : Summary
        The entry, as the store shows it now.

    Returns
    -------
    Commit
        The tombstone. Its summary is that of the removed entry, with the time of removal.

    Raises
    ------
    InputError
        If another writer has replaced or removed the entry meanwhile.
    """
    conflict = InputError(
        f"{describe_entry(summary)} was replaced or removed meanwhile: list the entries again and repeat"
    )
    latest = parse_generation(store.list_commit_paths_by_key(summary.key)[summary.key][-1])
    if latest != summary.generation:
        raise conflict
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    generation = get_next_generation(latest, summary.key)
    tombstone = Commit(
        kind="tombstone",
        run=uuid.uuid4().hex,
        summary=summary.model_copy(update={"generation": generation, "created": now}),
    )
    if create_or_get_commit(store, summary.key, generation, tombstone).run != tombstone.run:
        raise conflict
    return tombstone


def find_entry_history(
    store: Store,
    dataset: PinnedName,
    backbone_spec: str | None = None,
    image_size: int | None = None,
    progress: ProgressCallback = no_progress,
) -> list[CommitStatus]:
    """Return all commits of the keys that ever held a matching entry, oldest first within each key.

    Parameters
    ----------
    store : Store
    dataset : str
        ``NAME``, ``NAME@DIGEST`` or ``NAME@tuning``.
    backbone_spec, image_size : optional
        Spec and input size that the entries must have.

    Raises
    ------
    InputError
        If no entry matches.
    """
    statuses = read_commit_statuses(store, progress)
    summaries = [status.summary for status in statuses if status.summary]
    matching = filter_summaries_or_raise(
        summaries, dataset=dataset, backbone_spec=backbone_spec, image_size=image_size
    )
    keys = {summary.key for summary in matching}
    return [status for status in statuses if status.key in keys]


def find_entries_merged_from_removed(
    store: Store,
    visible_entries: Sequence[Summary],
    removed_entries: Sequence[Summary],
    progress: ProgressCallback = no_progress,
) -> list[Summary]:
    """Return the visible entries that were merged from the data of removed entries.

    A merged entry stays when one of its inputs is removed, so a takedown must list them. Costs two requests
    per entry of the same backbone. An entry whose card cannot be read is skipped with a warning.
    """
    fingerprints = {summary.fingerprint for summary in removed_entries}
    backbones = {summary.backbone_hash for summary in removed_entries}
    candidates = [
        s for s in visible_entries if s.backbone_hash in backbones and s.fingerprint not in fingerprints
    ]

    def contains_removed_data(summary: Summary) -> bool:
        try:
            return bool(fingerprints & set(read_dataset_card(store, summary).leaves))
        except (DamageError, UpgradeNeededError, AccessDeniedError) as error:
            LOG.warning("whether %s was merged from it is not known: %s", describe_entry(summary), error)
            return False

    flags = map_concurrently(contains_removed_data, candidates, progress, "look into", "entries")
    return [summary for summary, is_merged in zip(candidates, flags, strict=True) if is_merged]


def read_dataset_card(store: Store, summary: Summary) -> DatasetCard:
    """Read the dataset card of an entry without opening the entry.

    Raises
    ------
    DamageError
        If the entry is damaged.
    UpgradeNeededError
        If its cards need a newer version of this program.
    """
    commit = store.read_entry_commit(summary)
    with translate_errors(store.url):
        data = read_published_object(
            store.objects, f"runs/{commit.run}/zarr.json", commit.objects["zarr.json"]
        )
    return parse_entry_cards(commit, data).dataset
