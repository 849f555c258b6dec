"""What a key has held over time: entries that were replaced or removed, and how to remove one."""

import datetime
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfm.errors import DamageError, InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.cards import Commit, DatasetCard, Summary
from sfm.stats_store.commits import generation_after, generation_of, read_cards
from sfm.stats_store.concurrency import concurrently
from sfm.stats_store.location import UnreadableError, reaching
from sfm.stats_store.names import split_pin
from sfm.stats_store.publish import put_commit
from sfm.stats_store.schema import UpgradeError
from sfm.stats_store.select import described, every
from sfm.stats_store.store import Store
from sfm.stats_store.verified import read_published

LOG = logging.getLogger(__name__)

State = Literal["current", "replaced", "removed", "tombstone", "unreadable"]


@dataclass(frozen=True)
class Generation:
    """One commit of a key, and what has become of it.

    Attributes
    ----------
    key : str
        Backbone hash, dataset fingerprint and options digest, as in the path below ``index/``.
    number : int
        Rises by one with every commit of the key.
    path : str
        Of the commit object.
    commit : Commit or None
        None if it is damaged, or of a schema that this version cannot read; `problem` says which.
    state : {"current", "replaced", "removed", "tombstone", "unreadable"}
        Whether readers see it, a later generation took its place, a later tombstone hides it, it is such a
        tombstone itself, or it cannot be read.
    newest : bool
        Whether no later generation exists.
    """

    key: str
    number: int
    path: str
    commit: Commit | None
    problem: str
    state: State
    newest: bool

    @property
    def summary(self) -> Summary | None:
        """The summary of the entry that was published, or removed."""
        return self.commit.summary if self.commit else None

    @property
    def stored_bytes(self) -> int:
        """Size of all objects of the run."""
        return sum(record.size for record in self.commit.objects.values()) if self.commit else 0


def generations(store: Store, progress: ProgressCallback = no_progress) -> list[Generation]:
    """Return every commit of a store that still exists, by key, oldest first.

    One listing and one request per commit. What :func:`~sfm.stats_store.collect.collect` has deleted is not
    there any more.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    by_key = store.generations()
    paths = [path for versions in by_key.values() for path in versions]
    commits = concurrently(lambda path: commit_or_problem(store, path), paths, progress, "read", "commits")
    read = dict(zip(paths, commits, strict=True))
    found = []
    for key, versions in by_key.items():
        own = [read[path][0] for path in versions]
        for path, commit, state in zip(versions, own, states(own), strict=True):
            found.append(
                Generation(key, generation_of(path), path, commit, read[path][1], state, path == versions[-1])
            )
    return found


def commit_or_problem(store: Store, path: str) -> tuple[Commit | None, str]:
    """Return a commit, or None and what is wrong with it."""
    try:
        return store.commit(path), ""
    except (DamageError, UpgradeError, UnreadableError) as error:
        return None, str(error)


def states(commits: Sequence[Commit | None]) -> list[State]:
    """Return what has become of each commit of a key, oldest first; None is one that cannot be read."""
    last = len(commits) - 1
    tombs = {i for i, commit in enumerate(commits) if commit and commit.kind == "tombstone"}
    last_tomb = max(tombs, default=-1)

    def state(i: int) -> State:
        if commits[i] is None:
            return "unreadable"
        if i in tombs:
            return "tombstone"
        if i < last_tomb:
            return "removed"
        return "current" if i == last else "replaced"

    return [state(i) for i in range(len(commits))]


def known_summaries(store: Store, dataset: str, progress: ProgressCallback = no_progress) -> list[Summary]:
    """Return what a name can mean: all visible entries, and those replaced since that the name pins.

    ``NAME@DIGEST`` goes on meaning the same content when the entry is replaced, until the replaced run is
    collected. What was removed is not among them.

    Parameters
    ----------
    store : Store
    dataset : str
        ``NAME`` or ``NAME@DIGEST``. Older generations are looked at only for a digest that no visible entry
        has.
    """
    visible = store.summaries(progress)
    name, pin = split_pin(dataset, {s.dataset for s in visible})
    if not pin or pin == "tuning" or any(pinned(s, name, pin) for s in visible):
        return visible
    older = [g.summary for g in generations(store, progress) if g.state == "replaced"]
    # The same content may have been replaced by itself: one of its generations is enough.
    distinct = {(s.key, s.entry_digest): s for s in older if s and pinned(s, name, pin)}
    return visible + list(distinct.values())


def pinned(summary: Summary, name: str, pin: str) -> bool:
    """Say whether ``NAME@DIGEST`` can mean this entry."""
    return summary.dataset == name and summary.entry_digest.startswith(pin)


def remove(store: Store, summary: Summary) -> Commit:
    """Commit a tombstone: the entry is gone for every reader, its bytes stay until they are collected.

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
        If the entry is not the one that readers see now, because someone replaced or removed it meanwhile.
    """
    changed = InputError(f"{described(summary)} was replaced or removed meanwhile: look again and repeat")
    latest = generation_of(store.generations(summary.key)[summary.key][-1])
    if latest != summary.generation:
        raise changed
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    following = generation_after(latest, summary.key)
    removed = summary.model_copy(update={"generation": following, "created": now})
    tombstone = Commit(kind="tombstone", run=uuid.uuid4().hex, summary=removed)
    if put_commit(store, summary.key, following, tombstone).run != tombstone.run:
        raise changed
    return tombstone


def history_of(
    store: Store,
    dataset: str,
    backbone: str | None = None,
    image_size: int | None = None,
    progress: ProgressCallback = no_progress,
) -> list[Generation]:
    """Return all generations of the keys that ever held such an entry, oldest first within each key.

    Parameters
    ----------
    store : Store
    dataset : str
        ``NAME``, ``NAME@DIGEST`` or ``NAME@tuning``.
    backbone, image_size : optional
        Only this one.

    Raises
    ------
    InputError
        If no generation fits.
    """
    everything = generations(store, progress)
    summaries = [g.summary for g in everything if g.summary]
    keys = {s.key for s in every(summaries, dataset=dataset, backbone=backbone, image_size=image_size)}
    return [g for g in everything if g.key in keys]


def containing(
    store: Store,
    visible: Sequence[Summary],
    removed: Sequence[Summary],
    progress: ProgressCallback = no_progress,
) -> list[Summary]:
    """Return the visible entries that were merged from the data of entries that are to be removed.

    Whoever takes data down wants to know: a merged entry stays when one of its parts goes. Costs two requests
    per entry of the same backbone. An entry whose card cannot be read is passed over with a warning.
    """
    leaves = {s.fingerprint for s in removed}
    backbones = {s.backbone_hash for s in removed}
    others = [s for s in visible if s.backbone_hash in backbones and s.fingerprint not in leaves]

    def shares(summary: Summary) -> bool:
        try:
            return bool(leaves & set(dataset_card(store, summary).leaves))
        except (DamageError, UpgradeError, UnreadableError) as error:
            LOG.warning("whether %s was merged from it is not known: %s", described(summary), error)
            return False

    shared = concurrently(shares, others, progress, "look into", "entries")
    return [s for s, found in zip(others, shared, strict=True) if found]


def dataset_card(store: Store, summary: Summary) -> DatasetCard:
    """Read which images an entry is of, without opening it.

    Raises
    ------
    DamageError
        If the entry is damaged.
    UpgradeError
        If its cards are of a later version.
    """
    commit = store.commit_of(summary)
    with reaching(store.url):
        data = read_published(store.objects, f"runs/{commit.run}/zarr.json", commit.objects["zarr.json"])
    return read_cards(commit, data).dataset
