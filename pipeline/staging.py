"""Unfinished work on disk: features by partition, so that a killed extraction resumes where it was.

A partition's file appears under its name only when it is complete; what a killed process leaves under another
name is overwritten by the next.
"""

import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from sfm.deletion import delete_below
from sfm.errors import InputError
from sfm.locking import acquire
from sfm.pipeline.row_files import holds_rows, read_rows, write_rows
from sfm.pipeline.selection import Selection
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.limits import NAME_CHARACTERS
from sfm.pipeline.sources.source import Sample, SampleFile, Shard
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.stats_store.local_files import copy_permissions
from sfm.text import utf8_values
from sfm.untrusted import read_file

TASK_ROWS = BLOCK_ROWS


class Unfinished(Exception):  # noqa: N818 - a state of affairs, not a fault of the input
    """The work stopped before its end; what was completed is staged, and the same command goes on from it."""


@dataclass(frozen=True)
class Task:
    """What one worker reads at a time, in order; it becomes a partition.

    Attributes
    ----------
    split : str
    number : int
        Of the partition; where labels are not known, also of the shard.
    rows : ndarray of int64, shape (n,), or None
        Positions in the split, ascending; None for a whole shard, whose labels only reading tells.
    """

    split: str
    number: int
    rows: npt.NDArray[np.int64] | None

    @property
    def name(self) -> str:
        """Name of the partition's files."""
        return f"{self.split}-{self.number:06d}"

    def listed(self, source: Source) -> Iterator[Sample | SampleFile]:
        """Yield the samples; files of their own are not read."""
        return (
            self.shard(source).read(None)
            if self.rows is None
            else source.splits[self.split].listed(self.rows)
        )

    def shard(self, source: Source) -> Shard:
        """Return the shard that it is, where labels are not known."""
        return source.splits[self.split].shards[self.number]


def tasks_of(source: Source, selection: Selection | None) -> list[Task]:
    """Cut both splits into tasks; equal sources and selections give equal tasks.

    Of a split that is used whole, every shard is a task: many kinds read fastest that way. Of other splits,
    the samples in use are cut into tasks of ``TASK_ROWS``. Where labels are not known, there is no selection
    yet, and shards are read whole.
    """
    found: list[Task] = []
    for name, split in source.splits.items():
        if selection is None:
            found += [Task(name, number, None) for number in range(len(split.shards))]
            continue
        rows = selection.rows(name)
        whole = len(rows) == len(selection.labels[name])
        sizes = [0 if shard.labels is None else len(shard.labels) for shard in split.shards]
        cuts = np.cumsum(sizes)[:-1] if whole else np.arange(TASK_ROWS, len(rows), TASK_ROWS)
        parts = [part for part in np.split(rows, cuts) if len(part)]
        found += [Task(name, number, part) for number, part in enumerate(parts)]
    return found


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used.

    Attributes
    ----------
    place : int
        Among the samples that the task read.
    where, why : str
    """

    place: int
    where: str
    why: str


MARKS = ("composited", "dark")
"""What is remembered of single images, see `sfm.backbones.rendering.Rendered`."""


@dataclass(frozen=True)
class Found:
    """What reading a task told.

    Attributes
    ----------
    read : int
        Samples that were read.
    kept : list of int
        Places, among those, of the samples whose features are staged.
    skipped : list of Skipped
        Those that could not be decoded.
    classes : list of str
        Ids of the classes met, in the order of meeting; empty where labels were known.
    labels : list of int
        Per sample read, index into `classes`.
    marked : dict of str to list of int
        Places of the samples that have one of `MARKS`.
    examples : dict of str to str
        Names the first of them, for a person.
    unused : dict of str to int
        What was passed over beside the samples, by kind.
    written : list of list of str
        Per class met, the ways in which its labels are written; see `Sample.written`.
    """

    read: int
    kept: list[int]
    skipped: list[Skipped]
    classes: list[str]
    labels: list[int]
    marked: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    written: list[list[str]] = field(default_factory=list)


FOUND: TypeAdapter[Found] = TypeAdapter(Found)
FOUND_BYTES = 2**27
"""Of what reading a task tells: five million samples of a shard of the most members."""


def is_plausible(found: Found, task: Task) -> bool:
    """Say whether what is said to have been found in a task may have been: anybody may have written it."""
    kept, read = np.array(found.kept, dtype=np.int64), found.read
    skipped = [sample.place for sample in found.skipped]
    labels = np.array(found.labels, dtype=np.int64)
    known = task.rows is not None
    return (
        read >= 0
        and (task.rows is None or read == len(task.rows))
        and len(labels) == (0 if known else read)
        and are_places(kept, read)
        and are_places(np.array(skipped, dtype=np.int64), read)
        and not set(skipped).intersection(found.kept)
        and bool(((labels >= 0) & (labels < len(found.classes))).all())
        and len(set(found.classes)) == len(found.classes)
        and all(0 < len(class_id) <= NAME_CHARACTERS for class_id in found.classes)
        and set(found.marked) <= set(MARKS) & set(found.examples)
        and all(are_places(np.array(own, dtype=np.int64), read) for own in found.marked.values())
        and all(count >= 0 for count in found.unused.values())
    )


def are_places(places: npt.NDArray[np.int64], read: int) -> bool:
    """Say whether these are ascending places among so many samples."""
    inside = bool(((places >= 0) & (places < read)).all())
    return inside and bool((np.diff(places) > 0).all())


@dataclass(frozen=True)
class Partition:
    """Staged samples of one split: the unit of resuming.

    Attributes
    ----------
    split : str
    number : int
    samples : ndarray of int64, shape (n,)
        Positions in the split.
    labels : ndarray of int32, shape (n,)
        ``selection.UNUSED`` for samples that are not part of any entry.
    marked : dict of str to ndarray of bool, shape (n,)
        Which samples have one of `MARKS`; those that none has are left out.
    examples : dict of str to str
        As in `Found`.
    """

    split: str
    number: int
    samples: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    marked: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the partition's files."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class Staged:
    """Rows on disk that can be read again and again, block by block; memory holds one block.

    Iterating yields (features, labels) of one partition each: float32 (n, D) and int32 (n,).

    Attributes
    ----------
    files : tuple of Path
    labels : tuple of ndarray
    keep : tuple of ndarray of bool, optional
        Which rows of each file belong.
    """

    files: tuple[Path, ...]
    labels: tuple[npt.NDArray[np.int32], ...]
    keep: tuple[npt.NDArray[np.bool_], ...] | None = None

    def __iter__(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
        for i, file in enumerate(self.files):
            labels = self.labels[i]
            rows = read_rows(file, np.float32, len(labels))
            if self.keep is not None:
                rows, labels = rows[self.keep[i]], labels[self.keep[i]]
            if len(labels):
                yield rows, labels

    def all_labels(self) -> npt.NDArray[np.int32]:
        """Return the labels of all rows, in order."""
        parts = (
            self.labels if self.keep is None else [y[k] for y, k in zip(self.labels, self.keep, strict=True)]
        )
        return np.concatenate([*parts, np.zeros(0, dtype=np.int32)])

    def only(self, mask: npt.NDArray[np.bool_]) -> "Staged":
        """Return the rows that a mask over all rows marks."""
        sizes = [len(y) for y in self.labels] if self.keep is None else [int(k.sum()) for k in self.keep]
        parts = np.split(mask, np.cumsum(sizes)[:-1])
        if self.keep is None:
            return Staged(self.files, self.labels, tuple(parts))
        finer = []
        for whole, part in zip(self.keep, parts, strict=True):
            inner = whole.copy()
            inner[whole] = part
            finer.append(inner)
        return Staged(self.files, self.labels, tuple(finer))

    def blocks(self, dtype: npt.DTypeLike) -> Iterator[npt.NDArray[Any]]:
        """Yield the rows again in blocks of exactly ``BLOCK_ROWS``, but for the last."""
        waiting: list[npt.NDArray[Any]] = []
        size = 0
        for rows, _ in self:
            waiting.append(rows.astype(dtype, copy=False))
            size += len(rows)
            if size >= BLOCK_ROWS:
                whole = np.concatenate(waiting)
                for start in range(0, size - size % BLOCK_ROWS, BLOCK_ROWS):
                    yield whole[start : start + BLOCK_ROWS]
                waiting, size = [whole[size - size % BLOCK_ROWS :]], size % BLOCK_ROWS
        if size:
            yield np.concatenate(waiting)


@dataclass(frozen=True)
class Staging:
    """The folder that holds the partitions of one extraction."""

    root: Path

    def file(self, kind: str, of: Task | Partition) -> Path:
        """Return where rows of a kind (a backbone's hash, or ``digests``) lie once complete."""
        return self.root / kind / f"{of.name}.npy"

    def has(
        self, kind: str, of: Task | Partition, dtype: npt.DTypeLike, rows: int, columns: tuple[int, ...]
    ) -> bool:
        """Say whether those rows are complete, and what they should be: others may write here, too."""
        return holds_rows(self.file(kind, of), dtype, rows, columns)

    def sizes(self, of: Partition) -> npt.NDArray[np.int64]:
        """Return the encoded bytes of the samples of a partition."""
        return read_rows(self.file("sizes", of), np.int64, len(of.labels), ())

    def digests(self, of: Partition) -> npt.NDArray[np.uint8]:
        """Return the sample digests of a partition, shape (n, 32)."""
        return read_rows(self.file("digests", of), np.uint8, len(of.labels), (32,))

    def saw_others(self, task: Task, digests: npt.NDArray[np.uint8]) -> bool:
        """Say whether an earlier pass of a task, that is staged whole, saw other samples than these."""
        found, file = self.found(task), self.file("digests", task)
        if found is None or not holds_rows(file, np.uint8, len(found.kept), (32,)):
            return False
        return not np.array_equal(read_rows(file, np.uint8, len(found.kept), (32,)), digests)

    def put(self, kind: str, of: Task | Partition, rows: npt.NDArray[Any]) -> None:
        """Save rows; they appear all at once."""
        with appearing(self.file(kind, of)) as out:
            write_rows(out, rows)

    def found_file(self, task: Task) -> Path:
        """Return where it is told what reading a task told."""
        return self.root / "found" / f"{task.name}.json"

    def put_found(self, task: Task, found: Found) -> None:
        """Save what reading a task told; it comes last, so where it is, the digests are."""
        with appearing(self.found_file(task)) as out:
            out.write(json.dumps(utf8_values(dataclasses.asdict(found))).encode())

    def found(self, task: Task) -> Found | None:
        """Return what reading a task told; None if it was not read to its end, or the file is damaged."""
        try:
            found = FOUND.validate_json(read_file(self.found_file(task), FOUND_BYTES), strict=True)
            return found if is_plausible(found, task) else None
        except (OSError, ValueError, OverflowError):
            return None

    def forget(self, task: Task) -> None:
        """Delete all that is staged of a task."""
        delete_below(self.root, f"found/{self.found_file(task).name}")
        for file in self.root.glob(f"*/{task.name}.npy"):
            delete_below(self.root, file.relative_to(self.root))

    def staged(self, kind: str, of: Sequence[Partition]) -> Staged:
        """Return the rows of several partitions as one sequence."""
        return Staged(tuple(self.file(kind, p) for p in of), tuple(p.labels for p in of))


@contextmanager
def appearing(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete and on the disk.

    Two workers may be at the same file, when one was given up for dead: each writes its own.
    """
    # Not with parents: a worker that was given up must not bring back a folder that is done with.
    file.parent.mkdir(exist_ok=True)
    copy_permissions(file.parent, reference=file.parent.parent)
    part = file.with_name(f"{file.stem}-{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as out:
            copy_permissions(part, reference=file.parent)
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def open_staging(folder: Path, key: str, like: Path | None = None) -> Iterator[Staging]:
    """Claim the staging folder of an extraction for this process; it is deleted on success, kept on failure.

    A second process with the same key gets a private folder: both work, and the store decides who publishes.

    Parameters
    ----------
    folder : Path
        Where all staging folders are.
    key : str
        Equal for extractions that would compute the same features.
    like : Path, optional
        A folder whose permissions all that is staged gets: that of the store, if it is staged there, so that
        one of a team goes on with, or collects, what another left.

    Raises
    ------
    InputError
        If nothing can be written there.
    """
    with stageable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if like:
        copy_permissions(folder, like)
    with claim(folder / f"{key}.lock") as mine:
        root = folder / (key if mine and is_usable(folder / key) else f"{key}-{uuid.uuid4().hex[:8]}")
        with stageable(folder):
            root.mkdir(exist_ok=True)
        if like:
            copy_permissions(root, like)
        yield Staging(root)
        delete_below(folder, root.name)
        if mine:
            delete_below(folder, f"{key}.lock")


def is_usable(folder: Path) -> bool:
    """Say whether a folder, if it is there, may be written and holds no link.

    It may be what another user left, and what is behind a link may be anybody's.
    """
    if not os.path.lexists(folder):
        return True
    mine = folder.is_dir() and not folder.is_symlink() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    return mine and not any(path.is_symlink() for path in folder.iterdir())


@contextmanager
def stageable(folder: Path) -> Iterator[None]:
    """Turn a folder that cannot be written into an :class:`InputError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"cannot keep unfinished work in {folder}: {error.strerror}; name a folder that can be written "
            f"with --staging"
        ) from error


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Hold a lock that all who may write its folder can take; yields whether it is held."""
    if file.exists() and not os.access(file, os.W_OK):
        yield False  # of another user
        return
    with stageable(file.parent):
        lock = acquire(file)
    try:
        if lock is not None:
            copy_permissions(file, reference=file.parent)
        yield lock is not None
    finally:
        if lock is not None:
            lock.close()
