"""Select the samples of a source that an extraction uses, once the labels are known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.hold_out import count_held_out_per_class, refuse_single_sample_classes
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.class_labels import get_wordnet_names_or_ids
from sfm.pipeline.sources.validation import require_distillable_classes
from sfm.text import format_names

UNUSED_LABEL = -1


@dataclass(frozen=True)
class SampleSelection:
    """The classes and samples that an extraction uses.

    Attributes
    ----------
    class_ids, class_names : list of str
        Of the classes in use, both sorted by id.
    labels_by_split : dict of str to ndarray of int32
        For every sample that the source has: index into `class_ids`, or ``UNUSED_LABEL``.
    """

    class_ids: list[str]
    class_names: list[str]
    labels_by_split: dict[str, npt.NDArray[np.int32]]

    def list_used_positions(self, split: str) -> npt.NDArray[np.int64]:
        """Return the positions of the samples in use, ascending."""
        return np.flatnonzero(self.labels_by_split[split] != UNUSED_LABEL)


def select_samples(
    config: ExtractConfig,
    class_ids: Sequence[str],
    class_names: Sequence[str] | None,
    labels_by_split: Mapping[str, npt.NDArray[np.int32]],
    undecodable_positions_by_split: Mapping[str, npt.NDArray[np.int64]],
) -> SampleSelection:
    """Select samples and classes according to the config.

    Parameters
    ----------
    class_ids : sequence of str
        Sorted.
    class_names : sequence of str or None
        None: the names of WordNet ids, else the ids.
    labels_by_split : mapping of str to ndarray of int32
        Index into `class_ids` of every sample that the source has.
    undecodable_positions_by_split : mapping of str to ndarray of int64
        Positions of samples to leave out. They count towards ``--limit-per-class``, so that the
        selection of a sample does not depend on the content of others.

    Raises
    ------
    InputError
        If fewer than two classes are left, a class has no sample in a split, or has too few.
    """
    names = get_wordnet_names_or_ids(class_ids) if class_names is None else class_names
    labels_in_use = {}
    for split, split_labels in labels_by_split.items():
        labels_in_use[split] = np.full(len(split_labels), UNUSED_LABEL, dtype=np.int32)
        first = list_first_positions_per_class(split_labels, config.limit_per_class)
        labels_in_use[split][first] = split_labels[first]
        labels_in_use[split][undecodable_positions_by_split[split]] = UNUSED_LABEL
    counts = count_used_per_class_by_split(labels_in_use, len(class_ids))
    if config.hold_out is not None:
        counts["test"] = count_held_out_per_class(counts["train"], config.hold_out)
        counts["train"] = counts["train"] - counts["test"]
    left_out = sum(map(len, undecodable_positions_by_split.values()))
    when = f" once the {left_out} unreadable ones are skipped" if left_out else ""
    keep = np.ones(len(class_ids), dtype=bool)
    min_count = config.min_count or 0
    small = np.flatnonzero(counts["train"] < min_count)
    if len(small) and config.small_classes == "refuse":
        small_names = [f"{class_ids[c]} ({counts['train'][c]})" for c in small.tolist()]
        raise InputError(
            f"{config.source} has classes with fewer than {min_count} training images: "
            f"{format_names(small_names)}{when}; leave them out with --small-classes drop"
        )
    keep[small] = False
    kept_classes = np.flatnonzero(keep).tolist()
    kept_ids = [class_ids[c] for c in kept_classes]
    if config.hold_out is not None:
        refuse_single_sample_classes(kept_ids, counts["train"][keep] + counts["test"][keep])
    require_distillable_classes(
        config.source, kept_ids, {split: count[keep] for split, count in counts.items()}, when
    )
    index = np.append(np.where(keep, np.cumsum(keep) - 1, UNUSED_LABEL), UNUSED_LABEL).astype(np.int32)
    return SampleSelection(
        kept_ids,
        [names[c] for c in kept_classes],
        {split: index[split_labels] for split, split_labels in labels_in_use.items()},
    )


def select_samples_if_labels_known(config: ExtractConfig, source: Source) -> SampleSelection | None:
    """Select samples and classes before the pass; None if labels are known only once samples are read.

    Raises
    ------
    InputError
        As :func:`select_samples`.
    """
    if source.labels is None:
        return None
    none = {name: np.zeros(0, dtype=np.int64) for name in source.splits}
    return select_samples(config, source.class_ids or [], source.class_names, source.labels, none)


def count_used_per_class_by_split(
    labels_by_split: Mapping[str, npt.NDArray[np.int32]], class_count: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the samples in use per class, by split."""
    return {
        split: np.bincount(split_labels[split_labels != UNUSED_LABEL], minlength=class_count)
        for split, split_labels in labels_by_split.items()
    }


def list_first_positions_per_class(
    labels: npt.NDArray[np.int32], max_per_class: int | None
) -> npt.NDArray[np.int64]:
    """Return the positions of the first `max_per_class` samples of every class, ascending."""
    if max_per_class is None:
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.arange(len(order)) - starts
    return np.sort(order[rank < max_per_class])
