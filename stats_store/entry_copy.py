"""Copy entries between stores, byte for byte."""

import datetime
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from sfm.errors import DamageError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.array_layouts import parse_layouts_by_path_or_raise
from sfm.stats_store.cards import Commit, Summary
from sfm.stats_store.commits import (
    LastGenerationError,
    encode_commit_with_digest,
    get_next_generation,
    make_commit_file_name,
    make_commit_path,
    parse_commit,
    parse_entry_cards,
    parse_generation,
)
from sfm.stats_store.concurrency import MAX_REQUESTS, map_concurrently
from sfm.stats_store.digests import compute_sha256, encode_canonical_json
from sfm.stats_store.entry_history import read_commit_statuses
from sfm.stats_store.garbage_collection import DEFAULT_MIN_AGE
from sfm.stats_store.location import AccessDeniedError, translate_errors
from sfm.stats_store.objects import (
    ObjectExistsError,
    create_object_unless_identical,
    list_objects_and_unlisted_folders,
    read_object,
    sync_objects_to_disk,
)
from sfm.stats_store.publication import create_or_get_commit_and_mark_published
from sfm.stats_store.schema import UpgradeNeededError
from sfm.stats_store.store import Store
from sfm.stats_store.verification import EntryVerifier, VerifiedObjectCounter
from sfm.stats_store.verified_objects import read_published_object
from sfm.untrusted_files import parse_json

MAX_CONCURRENT_ENTRIES = 8
"""Entries copied at a time; each gets its share of ``MAX_REQUESTS``."""

MAX_RESUME_AGE = DEFAULT_MIN_AGE / 2
"""Age up to which an interrupted copy is resumed; garbage collection may delete older ones at any moment."""

CopyOutcome = Literal[
    "copied", "already there", "repaired", "differs in the target", "removed there", "damaged"
]


@dataclass(frozen=True)
class CopyResult:
    """The outcome of copying one entry.

    Attributes
    ----------
    summary : Summary
        Summary of the entry in the source.
    outcome : str
        The target holds the entry: ``copied``, ``already there``, or ``repaired`` if it was damaged there and
        got an undamaged generation. The target does not hold it: ``differs in the target`` if another entry
        has the same key, ``removed there`` if a tombstone hides it, ``damaged`` if the bytes in the source
        differ from the published ones, or are not a valid entry.
    detail : str
        Names the damaged object, or the reason why there is no copy.
    written_object_count, existing_object_count : int
        Number of objects written, and of objects found in the target with the right content.
    """

    summary: Summary
    outcome: CopyOutcome
    detail: str = ""
    written_object_count: int = 0
    existing_object_count: int = 0

    @property
    def is_in_target(self) -> bool:
        """Whether the target holds the entry."""
        return self.outcome in ("copied", "already there", "repaired")


class CopiedRun(NamedTuple):
    """A run that was copied: its id in the target, and the number of objects written, not found there."""

    run_id: str
    written_object_count: int


def copy_entries(
    source: Store,
    target: Store,
    summaries: Sequence[Summary],
    *,
    replace: bool = False,
    progress: ProgressCallback = no_progress,
) -> list[CopyResult]:
    """Copy entries between stores: every object byte for byte, also those of newer schema versions.

    Nothing in the target is changed. The copy keeps the run id of its source, so that the same command
    resumes an interrupted copy and writes no object twice. If the target uses that id for other content or in
    a commit, the copy gets another id.

    The copy is verified in the target, bytes and values, before it is committed there as the next generation
    of its key. The commit is otherwise the one of the source.

    Parameters
    ----------
    source, target : Store
    summaries : sequence of Summary
        Entries of the source to copy.
    replace : bool
        Commit the next generation also where the target holds another entry or a tombstone under the same
        key. Entries that it holds already are verified, and published again if they are damaged.
    progress : callable, optional
        Called after every entry.

    Returns
    -------
    list of CopyResult
        One per summary, in their order. A damaged entry does not stop the others.

    Raises
    ------
    InputError
        If a store cannot be reached, or the target cannot be written.
    """
    max_entries = min(MAX_CONCURRENT_ENTRIES, max(1, len(summaries)))
    copier = EntryCopier(source, target, MAX_REQUESTS // max_entries, replace)

    def copy_one(summary: Summary) -> CopyResult:
        try:
            return copier.copy_entry(summary)
        except DamageError as error:
            return CopyResult(summary, "damaged", str(error))
        except LastGenerationError as error:
            return CopyResult(summary, "differs in the target", str(error))

    return map_concurrently(copy_one, summaries, progress, "copy", "entries", max_threads=max_entries)


@dataclass
class EntryCopier:
    """Copies entries from one store to another; safe to use from several threads.

    Attributes
    ----------
    max_requests_per_entry : int
        Concurrent requests per entry.
    replace : bool
        See :func:`copy_entries`.
    """

    source: Store
    target: Store
    max_requests_per_entry: int
    replace: bool

    @cached_property
    def target_verifier(self) -> EntryVerifier:
        """The verifier of the target, which bounds the memory of all entries together."""
        return EntryVerifier(self.target, VerifiedObjectCounter(no_progress, 0))

    @cached_property
    def run_ids_committed_in_target(self) -> set[str]:
        """Ids of the runs that commits of the target refer to, of any key: none may get another object."""
        statuses = read_commit_statuses(self.target)
        return {status.commit.run for status in statuses if status.commit}

    def copy_entry(self, summary: Summary) -> CopyResult:
        """Copy one entry.

        Raises
        ------
        DamageError
            If the entry is damaged in the source, or the target returns other bytes than were written.
        """
        path = make_commit_path(summary)
        with translate_errors(self.source.url):
            source_commit, commit = read_object(
                self.source.objects, path, lambda data: (data, parse_commit(data, path))
            )
        latest, current_commit = read_newest_generation_and_commit(
            self.target, summary.key, ignore_damage=self.replace
        )
        is_same = current_commit is not None and has_same_entry_content(current_commit, summary)
        if is_same and not self.replace:
            return CopyResult(summary, "already there")
        if latest and not self.replace:
            is_removed = current_commit is not None and current_commit.kind == "tombstone"
            return CopyResult(summary, "removed there" if is_removed else "differs in the target")
        if current_commit and is_same and not self.find_problems_in_target(current_commit):
            return CopyResult(summary, "already there", existing_object_count=len(current_commit.objects))
        next_generation = get_next_generation(latest, summary.key)
        run, written = self.copy_missing_run_objects(commit)
        encoded = encode_renumbered_commit(source_commit, run, next_generation)
        path = f"index/{summary.key}/{make_commit_file_name(next_generation)}"
        if problems := self.find_problems_in_target(parse_commit(encoded, path)):
            raise DamageError(f"{problems[0]}; nothing was committed in {self.target.url}")
        winning_commit = create_or_get_commit_and_mark_published(self.target, path, encoded)
        outcome: CopyOutcome = "repaired" if is_same else "copied"
        if winning_commit.run != run:
            outcome = (
                "already there"
                if has_same_entry_content(winning_commit, summary)
                else "differs in the target"
            )
        return CopyResult(summary, outcome, "", written, len(commit.objects) - written)

    def find_problems_in_target(self, commit: Commit) -> list[str]:
        """Verify an entry in the target, before or after its commit; return one line per problem."""
        with translate_errors(self.target.url):
            verdict = self.target_verifier.verify_entry("", commit)
        if not verdict.is_access_granted:
            raise AccessDeniedError(verdict.problems[0])
        return verdict.problems

    def copy_missing_run_objects(self, commit: Commit) -> CopiedRun:
        """Copy all objects of a run that the target lacks.

        Raises
        ------
        DamageError
            If an object of the source differs from its published digest. Nothing is written if the cards
            contradict the commit, or the arrays contradict the cards.
        """
        names = [name for name in commit.objects if name.rpartition("/")[2] == "zarr.json"]
        read_source = self.make_verified_source_object_reader(commit)
        metadata = dict(
            zip(
                names,
                map_concurrently(read_source, names, max_threads=self.max_requests_per_entry),
                strict=True,
            )
        )
        try:
            cards = parse_entry_cards(commit, metadata["zarr.json"])
            metadata_by_path = {f"runs/{commit.run}/{name}": data for name, data in metadata.items()}
            parse_layouts_by_path_or_raise(commit, cards, metadata_by_path)
        except UpgradeNeededError as error:
            raise DamageError(f"{error}, which can verify it") from error
        for run in make_candidate_run_ids(commit):
            existing_names = self.find_existing_object_names_if_resumable(run, commit)
            if existing_names is not None:
                with suppress(ObjectExistsError):
                    return CopiedRun(
                        run, self.write_and_count_missing_objects(commit, run, metadata, existing_names)
                    )
        raise AssertionError("a new run id is never taken")

    def make_verified_source_object_reader(self, commit: Commit) -> Callable[[str], bytes]:
        """Return a function that reads an object of a source run and compares it with its record."""

        def read_source_object(name: str) -> bytes:
            with translate_errors(self.source.url):
                return read_published_object(
                    self.source.objects, f"runs/{commit.run}/{name}", commit.objects[name]
                )

        return read_source_object

    def find_existing_object_names_if_resumable(self, target_run_id: str, commit: Commit) -> set[str] | None:
        """Return the names of the objects that an interrupted copy left in the target, to resume it.

        None if the run id cannot be used: a commit refers to it, the run holds other content, or it is so old
        that garbage collection may delete it at any moment.
        """
        if target_run_id in self.run_ids_committed_in_target:
            return None
        with translate_errors(self.target.url):
            stored_objects, unreadable = list_objects_and_unlisted_folders(
                self.target.objects, f"runs/{target_run_id}", follow_links=False
            )
        if unreadable:
            return None
        if not stored_objects:
            return set()
        last_modified = max(item["last_modified"] for item in stored_objects)
        if datetime.datetime.now(datetime.UTC) - last_modified > MAX_RESUME_AGE:
            return None
        names = [item["path"].removeprefix(f"runs/{target_run_id}/") for item in stored_objects]
        have_same_content = map_concurrently(
            lambda name: self.is_object_intact_in_target(target_run_id, commit, name),
            names,
            max_threads=self.max_requests_per_entry,
        )
        return set(names) if all(have_same_content) else None

    def is_object_intact_in_target(self, target_run_id: str, commit: Commit, object_name: str) -> bool:
        """Return whether an object of a run in the target has the content that the commit records."""
        record = commit.objects.get(object_name)
        if record is None:
            return False
        try:
            with translate_errors(self.target.url):
                read_published_object(self.target.objects, f"runs/{target_run_id}/{object_name}", record)
        except DamageError:
            return False
        return True

    def write_and_count_missing_objects(
        self,
        commit: Commit,
        target_run_id: str,
        zarr_json_by_name: Mapping[str, bytes],
        existing_object_names: set[str],
    ) -> int:
        """Write the objects of a run that the target lacks; return their number.

        The cards come first: of two copies of different cards to one run id, one fails before it writes more.
        """
        read_source = self.make_verified_source_object_reader(commit)

        def create(name: str) -> bool:
            data = zarr_json_by_name[name] if name in zarr_json_by_name else read_source(name)
            with translate_errors(self.target.url):
                return create_object_unless_identical(
                    self.target.objects, f"runs/{target_run_id}/{name}", data
                )

        missing = [name for name in commit.objects if name not in existing_object_names]
        cards_names = [name for name in missing if name == "zarr.json"]
        other_names = [name for name in missing if name not in cards_names]
        written_count = sum(map(create, cards_names)) + sum(
            map_concurrently(create, other_names, max_threads=self.max_requests_per_entry)
        )
        with translate_errors(self.target.url):
            sync_objects_to_disk(self.target.objects, f"runs/{target_run_id}")
        return written_count


def make_candidate_run_ids(commit: Commit) -> tuple[str, str, str]:
    """Return run ids to try for a copy: that of the source, one derived from the content, a random one."""
    content = commit.model_dump(mode="json", include={"run", "objects"})
    return commit.run, compute_sha256(encode_canonical_json(content))[:32], uuid.uuid4().hex


def read_newest_generation_and_commit(
    store: Store, entry_key: str, *, ignore_damage: bool
) -> tuple[int, Commit | None]:
    """Return the latest generation number of a key and its commit; 0 and None if the key has none.

    With `ignore_damage`, the commit is None where it is damaged.
    """
    paths = store.list_commit_paths_by_key(entry_key).get(entry_key, [])
    if not paths:
        return 0, None
    try:
        return parse_generation(paths[-1]), store.read_commit(paths[-1])
    except DamageError:
        if not ignore_damage:
            raise
        return parse_generation(paths[-1]), None


def has_same_entry_content(commit: Commit, summary: Summary) -> bool:
    """Return whether a commit publishes the content that a summary describes."""
    return (
        commit.kind == "entry"
        and commit.summary is not None
        and commit.summary.entry_digest == summary.entry_digest
    )


def encode_renumbered_commit(encoded_commit: bytes, new_run_id: str, new_generation: int) -> bytes:
    """Return an encoded commit with another run id and generation; unknown fields are preserved."""
    content = parse_json(encoded_commit)["commit"]
    if (content["run"], content["summary"]["generation"]) == (new_run_id, new_generation):
        return encoded_commit
    content["run"], content["summary"]["generation"] = new_run_id, new_generation
    return encode_commit_with_digest(content)
