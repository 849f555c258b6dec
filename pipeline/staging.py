"""Unfinished work on disk: features by partition, so that a killed extraction resumes where it was.

A partition's file appears under its name only when it is complete; what a killed process leaves under another
name is overwritten by the next.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.pipeline.sources import Source
from sfm.pipeline.sources.source import limited
from sfm.stats_store.digest import BLOCK_ROWS


@dataclass(frozen=True)
class Partition:
    """Consecutive samples of one split: the unit of work, of resuming, and of chunks in the store.

    Attributes
    ----------
    split : str
    number : int
    samples : ndarray of int64, shape (n,)
        Indices into the split; n is ``BLOCK_ROWS`` for all but the last partition.
    labels : ndarray of int32, shape (n,)
    """

    split: str
    number: int
    samples: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]

    @property
    def name(self) -> str:
        """Name of the partition's files."""
        return f"{self.split}-{self.number:06d}"


def partitions(source: Source, limit_per_class: int | None) -> list[Partition]:
    """Cut both splits into partitions; equal sources and limits give equal partitions."""
    found = []
    for name, split in source.splits.items():
        samples = limited(split, limit_per_class)
        for number, start in enumerate(range(0, len(samples), BLOCK_ROWS)):
            chosen = samples[start : start + BLOCK_ROWS]
            found.append(Partition(name, number, chosen, split.labels[chosen]))
    return found


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
            rows, labels = np.load(file), self.labels[i]
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

    def file(self, kind: str, partition: Partition) -> Path:
        """Return where a partition's rows of a kind (a backbone's hash, or ``digests``) lie once complete."""
        return self.root / kind / f"{partition.name}.npy"

    def has(self, kind: str, partition: Partition) -> bool:
        """Say whether those rows are complete."""
        return self.file(kind, partition).exists()

    def put(self, kind: str, partition: Partition, rows: npt.NDArray[Any]) -> None:
        """Save rows; they appear all at once."""
        file = self.file(kind, partition)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            # numpy's own way of writing to a file forgets why it failed, e.g. that the disk is full.
            np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(rows))
            out.write(rows.tobytes(order="A"))
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)

    def staged(self, kind: str, of: list[Partition]) -> Staged:
        """Return the rows of several partitions as one sequence."""
        return Staged(tuple(self.file(kind, p) for p in of), tuple(p.labels for p in of))


@contextmanager
def open_staging(folder: Path, key: str) -> Iterator[Staging]:
    """Claim the staging folder of an extraction for this process; it is deleted on success, kept on failure.

    A second process with the same key gets a private folder: both work, and the store decides who publishes.

    Parameters
    ----------
    folder : Path
        Where all staging folders are.
    key : str
        Equal for extractions that would compute the same features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / f"{key}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        root = folder / key
    except BlockingIOError:
        root = folder / f"{key}-{uuid.uuid4().hex[:8]}"
    root.mkdir(exist_ok=True)
    with lock:
        yield Staging(root)
        shutil.rmtree(root)
        if root.name == key:
            Path(lock.name).unlink(missing_ok=True)
