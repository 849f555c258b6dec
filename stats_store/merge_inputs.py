"""The inputs of a merge: check that entries can be merged, and read their samples as those of the union."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from sfm.backbones.card import describe_backbone_differences
from sfm.errors import InputError
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.stats_store.entry_selection import describe_entry
from sfm.stats_store.merged_rendering import require_same_rendering
from sfm.stats_store.schema import parse_sub_class_count, strip_sub_class_suffix
from sfm.stats_store.store import Entry

MOMENT_ARRAYS = ("train/count", "train/mean", "train/scatter_diagonal", "train/within_scatter")
EQUAL_OPTIONS = ("precision", "views")
"""Options of an extraction that shape every feature: parts that differ in them have no common features."""


SplitName: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class SplitFeatures:
    """The features and labels of one split of all inputs, read block by block.

    Iterating yields (features, labels): float32 (n, D) and int32 (n,), with the class numbers of the union.

    Attributes
    ----------
    split : {"train", "test"}
    entries : tuple of Entry
    class_positions_in_union : tuple of ndarray of int
        Per entry, the positions of its classes in the union.
    """

    split: SplitName
    entries: tuple[Entry, ...]
    class_positions_in_union: tuple[npt.NDArray[np.intp], ...]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
        start = 0
        labels = self.read_labels_in_union()
        for entry in self.entries:
            samples = entry.open_array(f"{self.split}/feature").shape[0]
            for row in range(0, samples, BLOCK_ROWS):
                rows = entry.read_array(f"{self.split}/feature", slice(row, min(row + BLOCK_ROWS, samples)))
                yield rows.astype(np.float32), labels[start : start + len(rows)]
                start += len(rows)

    def read_labels_in_union(self) -> npt.NDArray[np.int32]:
        """Return the labels of all samples, in order."""
        labels = [
            positions[entry.read_array(f"{self.split}/label")]
            for entry, positions in zip(self.entries, self.class_positions_in_union, strict=True)
        ]
        return np.concatenate(labels).astype(np.int32)

    @property
    def feature_dtype(self) -> np.dtype[Any]:
        """The widest data type in which an input stores its features."""
        return np.result_type(*(entry.open_array(f"{self.split}/feature").dtype for entry in self.entries))

    def iterate_feature_blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the features in blocks of exactly ``BLOCK_ROWS``, but for the last."""
        pending = np.zeros((0, self.entries[0].backbone.features), dtype=self.feature_dtype)
        for rows, _ in self:
            pending = np.concatenate([pending, rows.astype(self.feature_dtype)])
            if len(pending) >= BLOCK_ROWS:
                yield pending[:BLOCK_ROWS]
                pending = pending[BLOCK_ROWS:]
        if len(pending):
            yield pending


@dataclass(frozen=True)
class MergeInputs:
    """The entries to merge, and the positions of their classes in the union.

    Attributes
    ----------
    entries : tuple of Entry
        In an order that depends only on their content.
    class_ids, class_names : list of str
        Classes of the union, sorted by class id.
    class_positions_in_union : tuple of ndarray of int
        Per entry, the positions of its classes in the union.
    """

    entries: tuple[Entry, ...]
    class_ids: list[str]
    class_names: list[str]
    class_positions_in_union: tuple[npt.NDArray[np.intp], ...]

    def get_split_features_if_all_stored(self, split: SplitName) -> SplitFeatures | None:
        """Return the features and labels of a split; None unless every input stores them."""
        if all(f"{split}/feature" in entry and f"{split}/label" in entry for entry in self.entries):
            return SplitFeatures(split, self.entries, self.class_positions_in_union)
        return None

    def list_shared_sub_class_counts(self) -> list[int]:
        """Return the numbers of sub-class centres that every input stores."""
        return sorted(set.intersection(*map(list_available_sub_class_counts, self.entries)))


def list_available_sub_class_counts(entry: Entry) -> set[int]:
    """Return the numbers of sub-class centres that an entry stores."""
    return {
        k
        for name in entry.list_array_names()
        if strip_sub_class_suffix(name) == "train/centre_count" and (k := parse_sub_class_count(name))
    }


def require_mergeable(entries: Sequence[Entry]) -> None:
    """Check that entries can be merged: they share no data, and their features are comparable.

    Raises
    ------
    InputError
        Names the entries that cannot be merged, with the reason.
    """
    if len(entries) < 2:
        raise InputError("a merge needs two parts or more")
    first_entry = entries[0]
    for entry in entries:
        names = f"{describe_entry(first_entry.summary)} and {describe_entry(entry.summary)}"
        if entry.backbone.hash != first_entry.backbone.hash:
            differing = " and ".join(describe_backbone_differences(first_entry.backbone, entry.backbone))
            raise InputError(f"{names} are of different backbones: they differ in {differing}")
        if entry.extraction.role != first_entry.extraction.role:
            roles = f"{first_entry.extraction.role}, {entry.extraction.role}"
            raise InputError(f"{names} have different roles: {roles}")
        for option in EQUAL_OPTIONS:
            value, first_value = (e.extraction.options.get(option) for e in (entry, first_entry))
            if value != first_value:
                raise InputError(f"{names} were extracted with different {option}: {first_value}, {value}")
        missing = [array for array in MOMENT_ARRAYS if array not in entry]
        if missing:
            raise InputError(
                f"{describe_entry(entry.summary)} cannot be merged: it holds no {', '.join(missing)}"
            )
    require_same_rendering(entries)
    leaf_counts = Counter(leaf for entry in entries for leaf in entry.dataset.leaves)
    shared_leaf = next((leaf for leaf, number in leaf_counts.items() if number > 1), None)
    if shared_leaf:
        holders = [describe_entry(entry.summary) for entry in entries if shared_leaf in entry.dataset.leaves]
        raise InputError(
            f"the parts share data: the dataset {shared_leaf[:12]} is in {' and in '.join(holders)}; merge "
            f"every dataset once"
        )


def make_merge_inputs(entries: Sequence[Entry]) -> MergeInputs:
    """Order the entries of a merge, and compute the positions of their classes in the union."""
    ordered = tuple(sorted(entries, key=lambda e: (e.dataset.fingerprint, e.summary.entry_digest)))
    names: dict[str, str] = {}
    for entry in ordered:
        for class_id, class_name in zip(entry.dataset.class_ids, entry.dataset.class_names, strict=True):
            names.setdefault(class_id, class_name)
    class_ids = sorted(names)
    position_by_id = {class_id: i for i, class_id in enumerate(class_ids)}
    positions = tuple(
        np.array([position_by_id[i] for i in entry.dataset.class_ids], dtype=np.intp) for entry in ordered
    )
    return MergeInputs(ordered, class_ids, [names[i] for i in class_ids], positions)
