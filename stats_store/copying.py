"""Copy entries between stores, byte for byte."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfm.errors import DamageError
from sfm.events import Listener, nobody
from sfm.stats_store.cards import Commit, ObjectRecord, Summary
from sfm.stats_store.commits import commit_name, generation_after, generation_of, parse_commit
from sfm.stats_store.concurrency import REQUESTS, concurrently
from sfm.stats_store.digest import canonical, sha256
from sfm.stats_store.location import list_readable, put_object, reaching, read_object, settle
from sfm.stats_store.publish import put_commit_bytes
from sfm.stats_store.store import Store
from sfm.stats_store.verified import read_published

ENTRIES = 8
"""Entries that are copied at a time, each by as many requests as that leaves of all."""

Outcome = Literal["copied", "already there", "repaired", "differs in the target", "removed there", "damaged"]


@dataclass(frozen=True)
class Copied:
    """What became of one entry that was to be copied.

    Attributes
    ----------
    summary : Summary
        Of the entry in the source.
    outcome : str
        ``copied``, ``already there``, or ``repaired``: the target now holds the entry, whole. Or why not:
        ``differs in the target``, where another entry has the same key; ``removed there``, where somebody
        took it down; ``damaged``, where the source does not hold what was published.
    detail : str
        Which object is damaged.
    written, found : int
        Objects that were written, and that were found in the target with the right content.
    """

    summary: Summary
    outcome: Outcome
    detail: str = ""
    written: int = 0
    found: int = 0

    @property
    def arrived(self) -> bool:
        """Whether the target holds the entry."""
        return self.outcome in ("copied", "already there", "repaired")


def copy(
    source: Store,
    target: Store,
    summaries: Sequence[Summary],
    *,
    replace: bool = False,
    progress: Listener = nobody,
) -> list[Copied]:
    """Copy entries: every object as it is, those that this version does not know too.

    An object that the target holds already, with the right size and digest, is not written again, so the
    same command goes on where it was interrupted. Every object is read back from the target, and only then
    is the entry committed there, under the next generation of its key; all else in the commit stays as it
    was.

    Parameters
    ----------
    source, target : Store
    summaries : sequence of Summary
        What to copy, as the source shows it.
    replace : bool
        Go over what the target holds under the same key, or what was removed there; and check every object
        of an entry that it holds already, and write the damaged ones again.
    progress : callable, optional
        Told about every object.

    Returns
    -------
    list of Copied
        One per summary, in their order. A damaged entry does not keep the others from being copied.

    Raises
    ------
    InputError
        If a store cannot be reached, or the target cannot be written.
    """
    entries = min(ENTRIES, max(1, len(summaries)))

    def copy_one(summary: Summary) -> Copied:
        try:
            return copy_entry(source, target, summary, REQUESTS // entries, replace=replace)
        except DamageError as error:
            return Copied(summary, "damaged", str(error))

    return concurrently(copy_one, summaries, progress, "copy", "entries", limit=entries)


def copy_entry(source: Store, target: Store, summary: Summary, requests: int, *, replace: bool) -> Copied:
    """Copy one entry.

    Raises
    ------
    DamageError
        If an object in the source is not what was published, or the target did not keep what was written.
    """
    path = f"index/{summary.key}/{commit_name(summary.generation)}"
    with reaching(source.url):
        raw, commit = read_object(source.objects, path, lambda data: (data, parse_commit(data, path)))
    latest, standing = newest(target, summary.key, tolerant=replace)
    same = standing is not None and standing.summary is not None and same_entry(standing, summary)
    if same and not replace:
        return Copied(summary, "already there")
    if latest and not replace:
        removed = standing is not None and standing.kind == "tombstone"
        return Copied(summary, "removed there" if removed else "differs in the target")
    committed = same and standing is not None and standing.run == commit.run
    written, found = carry(source, target, commit, requests, committed=committed)
    if committed:
        return Copied(summary, "repaired" if written else "already there", "", written, found)
    winner = commit_copy(target, raw, summary.key, generation_after(latest, summary.key))
    outcome: Outcome = "copied" if winner.run == commit.run else "differs in the target"
    return Copied(summary, outcome, "", written, found)


def newest(store: Store, key: str, *, tolerant: bool) -> tuple[int, Commit | None]:
    """Return the highest generation of a key and its commit; 0 and None where there is none.

    With `tolerant`, a damaged commit counts as one that may be gone over: None with its number.
    """
    paths = store.generations(key).get(key, [])
    if not paths:
        return 0, None
    try:
        return generation_of(paths[-1]), store.commit(paths[-1])
    except DamageError:
        if not tolerant:
            raise
        return generation_of(paths[-1]), None


def same_entry(commit: Commit, summary: Summary) -> bool:
    """Say whether a commit shows an entry of the same content."""
    return (
        commit.kind == "entry"
        and commit.summary is not None
        and commit.summary.entry_digest == summary.entry_digest
    )


def carry(source: Store, target: Store, commit: Commit, requests: int, *, committed: bool) -> tuple[int, int]:
    """Make the target hold every object of a run; returns how many were written, and how many found there.

    Unless the run is committed there already, its root metadata is written in any case and first: a run with
    a new object is safe from garbage collection, however long ago the rest of it was copied.
    """
    run = f"runs/{commit.run}"
    with reaching(target.url):
        there = {item["path"]: item["size"] for item in list_readable(target.objects, run)[0]}

    def transfer(name: str, *, anyway: bool = False) -> bool:
        path, record = f"{run}/{name}", commit.objects[name]
        if not anyway and there.get(path) == record.size and is_published(target, path, record):
            return False
        with reaching(source.url):
            data = read_published(source.objects, path, record)
        with reaching(target.url):
            put_object(target.objects, path, data)
            try:
                read_published(target.objects, path, record)
            except DamageError as error:
                raise DamageError(f"{error}: {target.url} did not keep what was written there") from error
        return True

    first = [] if committed else ["zarr.json"]
    written = sum(transfer(name, anyway=True) for name in first)
    rest = [name for name in commit.objects if name not in first]
    written += sum(concurrently(transfer, rest, limit=requests))
    with reaching(target.url):
        settle(target.objects, run)
    return written, len(commit.objects) - written


def is_published(store: Store, path: str, record: ObjectRecord) -> bool:
    """Say whether an object is what was published."""
    try:
        with reaching(store.url):
            read_published(store.objects, path, record)
    except DamageError:
        return False
    return True


def commit_copy(target: Store, raw: bytes, key: str, generation: int) -> Commit:
    """Commit a copied run; fields that this version does not know are kept.

    Returns
    -------
    Commit
        The one that now stands under this generation: the copy's, or one that was there first.
    """
    content = json.loads(raw)["commit"]
    path = f"index/{key}/{commit_name(generation)}"
    if content["summary"]["generation"] != generation:
        content["summary"]["generation"] = generation
        raw = json.dumps({"commit": content, "sha256": sha256(canonical(content))}).encode()
    return put_commit_bytes(target, path, raw)
