"""Which samples of a source an extraction uses, once the labels are known: before the pass, or after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.hold_out import count_held_out, require_divisible
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.class_labels import get_display_names
from sfm.pipeline.sources.validation import require_distillable_classes
from sfm.text import format_names

UNUSED_LABEL = -1


@dataclass(frozen=True)
class SampleSelection:
    """The samples in use.

    Attributes
    ----------
    class_ids, class_names : list of str
        Of the classes in use; both orders are that of the ids.
    labels : dict of str to ndarray of int32
        By split, for every sample that the source has: index into `class_ids`, or ``UNUSED_LABEL``.
    """

    class_ids: list[str]
    class_names: list[str]
    labels: dict[str, npt.NDArray[np.int32]]

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Return the positions of the samples in use, ascending."""
        return np.flatnonzero(self.labels[split] != UNUSED_LABEL)


def select_samples(
    config: ExtractConfig,
    class_ids: Sequence[str],
    class_names: Sequence[str] | None,
    labels: Mapping[str, npt.NDArray[np.int32]],
    unreadable: Mapping[str, npt.NDArray[np.int64]],
) -> SampleSelection:
    """Choose samples and classes as the configuration asks.

    Parameters
    ----------
    class_ids : sequence of str
        Sorted.
    class_names : sequence of str or None
        None: as for WordNet ids, else the ids.
    labels : mapping of str to ndarray of int32
        By split, index into `class_ids` of every sample that the source has.
    unreadable : mapping of str to ndarray of int64
        By split, positions of samples that are left out. They count towards ``--limit-per-class``, so that
        which samples are read does not depend on what others hold.

    Raises
    ------
    InputError
        If fewer than two classes are left, a class has no sample in a split, or has too few.
    """
    names = get_display_names(class_ids) if class_names is None else class_names
    used = {}
    for split, own in labels.items():
        used[split] = np.full(len(own), UNUSED_LABEL, dtype=np.int32)
        first = limit_per_class(own, config.limit_per_class)
        used[split][first] = own[first]
        used[split][unreadable[split]] = UNUSED_LABEL
    counts = count_per_class(used, len(class_ids))
    if config.hold_out is not None:
        counts["test"] = count_held_out(counts["train"], config.hold_out)
        counts["train"] = counts["train"] - counts["test"]
    left_out = sum(map(len, unreadable.values()))
    when = f" once the {left_out} unreadable ones are skipped" if left_out else ""
    keep = np.ones(len(class_ids), dtype=bool)
    least = config.min_count or 0
    small = np.flatnonzero(counts["train"] < least)
    if len(small) and config.small_classes == "refuse":
        told = [f"{class_ids[c]} ({counts['train'][c]})" for c in small.tolist()]
        raise InputError(
            f"{config.source} has classes with fewer than {least} training images: "
            f"{format_names(told)}{when}; leave them out with --small-classes drop"
        )
    keep[small] = False
    kept = np.flatnonzero(keep).tolist()
    ids = [class_ids[c] for c in kept]
    if config.hold_out is not None:
        require_divisible(ids, counts["train"][keep] + counts["test"][keep])
    kept_counts = {split: count[keep] for split, count in counts.items()}
    require_distillable_classes(config.source, ids, kept_counts, when)
    index = np.append(np.where(keep, np.cumsum(keep) - 1, UNUSED_LABEL), UNUSED_LABEL).astype(np.int32)
    return SampleSelection(ids, [names[c] for c in kept], {split: index[own] for split, own in used.items()})


def select_by_listed_labels(config: ExtractConfig, source: Source) -> SampleSelection | None:
    """Choose samples and classes before anything is read; None if only reading tells the labels.

    Raises
    ------
    InputError
        As :func:`select_samples`.
    """
    if source.labels is None:
        return None
    none = {name: np.zeros(0, dtype=np.int64) for name in source.splits}
    return select_samples(config, source.class_ids or [], source.class_names, source.labels, none)


def count_per_class(
    labels: Mapping[str, npt.NDArray[np.int32]], classes: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the samples in use per class, by split."""
    return {split: np.bincount(own[own != UNUSED_LABEL], minlength=classes) for split, own in labels.items()}


def limit_per_class(labels: npt.NDArray[np.int32], most: int | None) -> npt.NDArray[np.int64]:
    """Return the positions of the first `most` samples of every class, ascending."""
    if most is None:
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.arange(len(order)) - starts
    return np.sort(order[rank < most])
