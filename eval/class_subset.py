"""An entry's statistics for the classes that a run distilled: all of them, or some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.stats_store.class_moments import ClassMoments
from sfm.stats_store.store import Entry

RANDOM_ROLE, NEAREST_ROLE, EMPTY_ROLE = 0, 1, 255
"""Values of ``exemplar/role``: drawn at random, nearest to the class mean, no exemplar."""


class HeldOutArrays(NamedTuple):
    """Features and labels of the held-out samples of some classes.

    Attributes
    ----------
    features : ndarray of float32, shape (sample, feature)
    subset_labels : ndarray of int64, shape (sample,)
        Index of each sample's class among those classes.
    """

    features: npt.NDArray[np.float32]
    subset_labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassSubsetStatistics:
    """The statistics of some classes of an entry.

    Attributes
    ----------
    entry : Entry
    class_indices : ndarray of int64, shape (class,)
        Indices of the classes in the entry, ascending.
    """

    entry: Entry
    class_indices: npt.NDArray[np.int64]

    @property
    def has_all_classes(self) -> bool:
        """Whether these are all classes of the entry."""
        return len(self.class_indices) == len(self.entry.dataset.class_ids)

    def read_per_class_array(self, array_name: str) -> npt.NDArray[Any]:
        """Return the rows of these classes of an array whose first axis counts classes."""
        return self.entry.read_array(array_name)[self.class_indices]

    def read_held_out_arrays(self) -> HeldOutArrays:
        """Return features and labels of the held-out samples of these classes."""
        features, labels = self.entry.read_array("test/feature"), self.entry.read_array("test/label")
        mask = np.isin(labels, self.class_indices)
        positions = np.searchsorted(self.class_indices, labels[mask]).astype(np.int64)
        return HeldOutArrays(features[mask].astype(np.float32), positions)

    def read_moments(self) -> ClassMoments:
        """Return the moments of these classes.

        The store keeps the pooled within-class scatter of all classes together. For some classes it is scaled
        to their degrees of freedom, so that the covariance stays the pooled one.
        """
        all_counts = self.entry.read_array("train/count")
        counts = all_counts[self.class_indices]
        all_degrees = all_counts.sum() - (all_counts > 0).sum()
        scale = (counts.sum() - (counts > 0).sum()) / all_degrees if all_degrees else 1.0
        return ClassMoments(
            counts,
            self.read_per_class_array("train/mean"),
            self.read_per_class_array("train/scatter_diagonal"),
            self.entry.read_array("train/within_scatter") * scale,
        )


def select_statistics_of_run_classes(
    entry: Entry, run_class_ids: Sequence[str], run_directory: Path
) -> ClassSubsetStatistics:
    """Return the statistics of a run's classes from the entry that it was distilled from.

    Raises
    ------
    InputError
        If the entry does not hold the classes in their order.
    """
    indices_by_id = {class_id: index for index, class_id in enumerate(entry.dataset.class_ids)}
    class_indices = np.array([indices_by_id.get(class_id, -1) for class_id in run_class_ids])
    if class_indices.min() < 0 or (np.diff(class_indices) <= 0).any():
        raise InputError(
            f"the classes in {run_directory / 'classes.json'} are not those of "
            f"{entry.dataset.name}@{entry.summary.entry_digest[:12]}, which run.json names"
        )
    return ClassSubsetStatistics(entry, class_indices)
