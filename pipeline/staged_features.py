"""Staged partitions, and their features as rows that are read from disk block by block."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.pipeline.row_files import read_validated_rows
from sfm.stats_store.digests import BLOCK_ROWS


@dataclass(frozen=True)
class StagedPartition:
    """Staged samples of one split: the unit of resuming.

    Attributes
    ----------
    split : str
    number : int
    positions_in_split : ndarray of int64, shape (n,)
        Positions in the split.
    labels : ndarray of int32, shape (n,)
        ``selection.UNUSED_LABEL`` for samples that are part of no entry.
    masks_by_image_mark : dict of str to ndarray of bool, shape (n,)
        Which samples have one of `IMAGE_MARKS`; marks that no sample has are left out.
    example_locations_by_image_mark : dict of str to str
        As `TaskResult.examples`.
    """

    split: str
    number: int
    positions_in_split: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    masks_by_image_mark: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    example_locations_by_image_mark: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the partition's files."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class StagedFeatures:
    """Rows on disk that can be read repeatedly, block by block; memory holds one block.

    Iterating yields (features, labels) of one partition each: float32 (n, D) and int32 (n,).

    Attributes
    ----------
    files : tuple of Path
    labels : tuple of ndarray
    masks : tuple of ndarray of bool, optional
        Which rows of each file are in use.
    """

    files: tuple[Path, ...]
    labels: tuple[npt.NDArray[np.int32], ...]
    masks: tuple[npt.NDArray[np.bool_], ...] | None = None

    def __iter__(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
        for number in range(len(self.files)):
            rows, labels = self.read_partition(number)
            if len(labels):
                yield rows, labels

    def read_partition(self, number: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Return the rows in use of one file, float32 of shape (n, D), and their labels."""
        labels = self.labels[number]
        rows = read_validated_rows(self.files[number], np.float32, len(labels))
        if self.masks is None:
            return rows, labels
        return rows[self.masks[number]], labels[self.masks[number]]

    def concatenate_labels(self) -> npt.NDArray[np.int32]:
        """Return the labels of all rows in use, in order."""
        labels = (
            self.labels
            if self.masks is None
            else [y[mask] for y, mask in zip(self.labels, self.masks, strict=True)]
        )
        return np.concatenate([*labels, np.zeros(0, dtype=np.int32)])

    def select_rows(self, mask: npt.NDArray[np.bool_]) -> "StagedFeatures":
        """Return the rows that a mask over all rows in use marks."""
        sizes = [len(y) for y in self.labels] if self.masks is None else [int(m.sum()) for m in self.masks]
        pieces = np.split(mask, np.cumsum(sizes)[:-1])
        if self.masks is None:
            return StagedFeatures(self.files, self.labels, tuple(pieces))
        masks = []
        for before, piece in zip(self.masks, pieces, strict=True):
            combined = before.copy()
            combined[before] = piece
            masks.append(combined)
        return StagedFeatures(self.files, self.labels, tuple(masks))

    def iterate_feature_blocks(self, dtype: npt.DTypeLike) -> Iterator[npt.NDArray[Any]]:
        """Yield the rows in blocks of ``BLOCK_ROWS``; only the last one may be shorter."""
        pending: list[npt.NDArray[Any]] = []
        size = 0
        for rows, _ in self:
            pending.append(rows.astype(dtype, copy=False))
            size += len(rows)
            if size >= BLOCK_ROWS:
                joined = np.concatenate(pending)
                for start in range(0, size - size % BLOCK_ROWS, BLOCK_ROWS):
                    yield joined[start : start + BLOCK_ROWS]
                pending, size = [joined[size - size % BLOCK_ROWS :]], size % BLOCK_ROWS
        if size:
            yield np.concatenate(pending)
