"""An entry's statistics, of the classes that a run distilled: all of them, or some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.stats_store.class_moments import Moments
from sfm.stats_store.store import Entry


@dataclass(frozen=True)
class Part:
    """Some classes of an entry.

    Attributes
    ----------
    entry : Entry
    classes : ndarray of int64, shape (class,)
        Their places in the entry, ascending.
    """

    entry: Entry
    classes: npt.NDArray[np.int64]

    @property
    def whole(self) -> bool:
        """Whether these are all classes of the entry."""
        return len(self.classes) == len(self.entry.dataset.class_ids)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read the rows of these classes of an array whose first axis counts classes."""
        return self.entry.read_array(name)[self.classes]

    def held_out(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Read the held-out samples of these classes.

        Returns
        -------
        ndarray, shape (sample, feature)
        ndarray, shape (sample,)
            Classes by their place in `classes`.
        """
        features, labels = self.entry.read_array("test/feature"), self.entry.read_array("test/label")
        own = np.isin(labels, self.classes)
        return features[own].astype(np.float32), np.searchsorted(self.classes, labels[own]).astype(np.int64)

    def moments(self) -> Moments:
        """Read the moments of these classes.

        The pooled within-class scatter is kept of all classes together: what is left of it for some is scaled
        to their degrees of freedom, so that the covariance is the pooled one.
        """
        count = self.entry.read_array("train/count")
        kept = count[self.classes]
        freedom = count.sum() - (count > 0).sum()
        share = (kept.sum() - (kept > 0).sum()) / freedom if freedom else 1.0
        return Moments(
            kept,
            self.read("train/mean"),
            self.read("train/scatter_diagonal"),
            self.entry.read_array("train/within_scatter") * share,
        )


def part_of(entry: Entry, class_ids: Sequence[str], directory: Path) -> Part:
    """Find the classes of a run in the entry that it was distilled from.

    Raises
    ------
    InputError
        If the entry does not hold them, in their order.
    """
    places = {class_id: place for place, class_id in enumerate(entry.dataset.class_ids)}
    classes = np.array([places.get(class_id, -1) for class_id in class_ids])
    if classes.min() < 0 or (np.diff(classes) <= 0).any():
        raise InputError(
            f"the classes in {directory / 'classes.json'} are not those of "
            f"{entry.dataset.name}@{entry.summary.entry_digest[:12]}, which run.json names"
        )
    return Part(entry, classes)
