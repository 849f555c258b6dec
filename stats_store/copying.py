"""Copy entries between stores, byte for byte."""

import datetime
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sfm.errors import DamageError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.cards import Commit, Summary
from sfm.stats_store.collect import SAFE_AGE
from sfm.stats_store.commits import (
    LastGenerationError,
    commit_name,
    commit_path,
    generation_after,
    generation_of,
    parse_commit,
    read_cards,
    seal,
)
from sfm.stats_store.concurrency import REQUESTS, concurrently
from sfm.stats_store.declared import require_layouts
from sfm.stats_store.digest import canonical, sha256
from sfm.stats_store.history import generations
from sfm.stats_store.location import UnreadableError, reaching
from sfm.stats_store.objects import OccupiedError, list_readable, read_object, settle, write_object
from sfm.stats_store.publish import put_commit_bytes
from sfm.stats_store.schema import UpgradeError
from sfm.stats_store.store import Store
from sfm.stats_store.verified import read_published
from sfm.stats_store.verify import Check, Counter
from sfm.untrusted_files import parse_json

ENTRIES = 8
"""Entries that are copied at a time, each by as many requests as that leaves of all."""

RESUMED = SAFE_AGE / 2
"""How long a copy goes on with what an earlier one left: then garbage collection may be about to take it."""

Outcome = Literal["copied", "already there", "repaired", "differs in the target", "removed there", "damaged"]


@dataclass(frozen=True)
class Copied:
    """What became of one entry that was to be copied.

    Attributes
    ----------
    summary : Summary
        Of the entry in the source.
    outcome : str
        ``copied``, ``already there``, or ``repaired``: the target now holds the entry, whole; repaired is
        one that was damaged there, and now has a sound generation. Or why not: ``differs in the target``,
        where another entry has the same key; ``removed there``, where somebody took it down; ``damaged``,
        where the source does not hold what was published, or what was published is not an entry.
    detail : str
        What is damaged, or in the way.
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
    progress: ProgressCallback = no_progress,
) -> list[Copied]:
    """Copy entries: every object as it is, those that this version does not know too.

    Nothing that the target holds is changed. The copy has the run id of its source, so that the same command
    goes on where it was interrupted: an object that is there already is not written again. Where that id is
    taken, by other content or by a commit, the copy has another.

    The copy is verified in the target, byte by byte and number by number, and only then committed there,
    under the next generation of its key; all else in the commit stays as it was.

    Parameters
    ----------
    source, target : Store
    summaries : sequence of Summary
        What to copy, as the source shows it.
    replace : bool
        Go over what the target holds under the same key, or what was removed there; and verify an entry that
        it holds already, and publish it again if it is damaged.
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
    copying = Copying(source, target, REQUESTS // entries, replace)

    def copy_one(summary: Summary) -> Copied:
        try:
            return copying.entry(summary)
        except DamageError as error:
            return Copied(summary, "damaged", str(error))
        except LastGenerationError as error:
            return Copied(summary, "differs in the target", str(error))

    return concurrently(copy_one, summaries, progress, "copy", "entries", limit=entries)


@dataclass
class Copying:
    """Copies entries from one store to another, some at a time.

    Attributes
    ----------
    requests : int
        Under way at a time, per entry.
    replace : bool
        See :func:`copy`.
    """

    source: Store
    target: Store
    requests: int
    replace: bool

    @cached_property
    def check(self) -> Check:
        """What verifies entries in the target, all within one bound of memory."""
        return Check(self.target, Counter(no_progress, 0))

    @cached_property
    def taken(self) -> set[str]:
        """The runs that a commit of the target refers to, whatever its key: none may get another object."""
        return {g.commit.run for g in generations(self.target) if g.commit}

    def entry(self, summary: Summary) -> Copied:
        """Copy one entry.

        Raises
        ------
        DamageError
            If it is not whole and sound in the source, or the target did not keep what was written.
        """
        path = commit_path(summary)
        with reaching(self.source.url):
            raw, commit = read_object(
                self.source.objects, path, lambda data: (data, parse_commit(data, path))
            )
        latest, standing = newest(self.target, summary.key, tolerant=self.replace)
        same = standing is not None and same_entry(standing, summary)
        if same and not self.replace:
            return Copied(summary, "already there")
        if latest and not self.replace:
            removed = standing is not None and standing.kind == "tombstone"
            return Copied(summary, "removed there" if removed else "differs in the target")
        if standing and same and not self.problems(standing):
            return Copied(summary, "already there", found=len(standing.objects))
        following = generation_after(latest, summary.key)
        run, written = self.carry(commit)
        data = with_run(raw, run, following)
        path = f"index/{summary.key}/{commit_name(following)}"
        if problems := self.problems(parse_commit(data, path)):
            raise DamageError(f"{problems[0]}; nothing was committed in {self.target.url}")
        winner = put_commit_bytes(self.target, path, data)
        outcome: Outcome = "repaired" if same else "copied"
        if winner.run != run:
            outcome = "already there" if same_entry(winner, summary) else "differs in the target"
        return Copied(summary, outcome, "", written, len(commit.objects) - written)

    def problems(self, commit: Commit) -> list[str]:
        """Return what is wrong with an entry in the target, committed there or about to be."""
        with reaching(self.target.url):
            verdict = self.check.entry("", commit)
        if not verdict.readable:
            raise UnreadableError(verdict.problems[0])
        return verdict.problems

    def carry(self, commit: Commit) -> tuple[str, int]:
        """Make the target hold every object of a run; returns the id it has there, and how many were written.

        Raises
        ------
        DamageError
            If an object of the source is not what was published. Nothing is written where cards are not those
            of the entry, or arrays not what the cards declare.
        """
        metadata = [name for name in commit.objects if name.rpartition("/")[2] == "zarr.json"]
        read = dict(
            zip(metadata, concurrently(self.reader(commit), metadata, limit=self.requests), strict=True)
        )
        try:
            cards = read_cards(commit, read["zarr.json"])
            whole = {f"runs/{commit.run}/{name}": data for name, data in read.items()}
            require_layouts(commit, cards, whole)
        except UpgradeError as error:
            raise DamageError(f"{error}, which can verify it") from error
        for run in run_ids(commit):
            there = self.objects_there(run, commit)
            if there is not None:
                with suppress(OccupiedError):
                    return run, self.transfer(commit, run, read, there)
        raise AssertionError("a run id that nobody has had is never taken")

    def reader(self, commit: Commit) -> Callable[[str], bytes]:
        """Return what reads an object of a run in the source, and compares it with its record."""

        def read(name: str) -> bytes:
            with reaching(self.source.url):
                return read_published(self.source.objects, f"runs/{commit.run}/{name}", commit.objects[name])

        return read

    def objects_there(self, run: str, commit: Commit) -> set[str] | None:
        """Return the objects that an earlier copy left in the target; None if the run is somebody else's.

        It is if a commit refers to it, or if anything in it is not of this entry. What is too old may be
        collected at any moment, and is left to that.
        """
        if run in self.taken:
            return None
        with reaching(self.target.url):
            listed, unreadable = list_readable(self.target.objects, f"runs/{run}", follow=False)
        if unreadable:
            return None
        if not listed:
            return set()
        newest = max(item["last_modified"] for item in listed)
        if datetime.datetime.now(datetime.UTC) - newest > RESUMED:
            return None
        names = [item["path"].removeprefix(f"runs/{run}/") for item in listed]
        ours = concurrently(lambda name: self.is_there(run, commit, name), names, limit=self.requests)
        return set(names) if all(ours) else None

    def is_there(self, run: str, commit: Commit, name: str) -> bool:
        """Say whether an object of the target is that of the entry."""
        record = commit.objects.get(name)
        if record is None:
            return False
        try:
            with reaching(self.target.url):
                read_published(self.target.objects, f"runs/{run}/{name}", record)
        except DamageError:
            return False
        return True

    def transfer(self, commit: Commit, run: str, read: Mapping[str, bytes], there: set[str]) -> int:
        """Create the objects that are not there; returns how many.

        The metadata with the cards comes first: of two copies to one run id with other cards, one fails then.
        """
        from_source = self.reader(commit)

        def create(name: str) -> bool:
            data = read[name] if name in read else from_source(name)
            with reaching(self.target.url):
                return write_object(self.target.objects, f"runs/{run}/{name}", data)

        missing = [name for name in commit.objects if name not in there]
        first = [name for name in missing if name == "zarr.json"]
        rest = [name for name in missing if name not in first]
        written = sum(map(create, first)) + sum(concurrently(create, rest, limit=self.requests))
        with reaching(self.target.url):
            settle(self.target.objects, f"runs/{run}")
        return written


def run_ids(commit: Commit) -> tuple[str, str, str]:
    """Return the ids that a copied run may have: its own, one that follows from it, and a new one."""
    content = commit.model_dump(mode="json", include={"run", "objects"})
    return commit.run, sha256(canonical(content))[:32], uuid.uuid4().hex


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


def with_run(raw: bytes, run: str, generation: int) -> bytes:
    """Return a commit with another run and generation; fields that this version does not know are kept."""
    content = parse_json(raw)["commit"]
    if (content["run"], content["summary"]["generation"]) == (run, generation):
        return raw
    content["run"], content["summary"]["generation"] = run, generation
    return seal(content)
