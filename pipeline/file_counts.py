"""Count the files of a dataset that were found, used, and not used, by kind."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sfm.pipeline.selection import UNUSED_LABEL, SampleSelection
from sfm.pipeline.sources.inventory import format_counts_by_kind
from sfm.stats_store.cards import FileCounts
from sfm.text import sanitize_line

LIMITED_IMAGES = "images beyond --limit-per-class"
SMALL_CLASS_IMAGES = "images of classes below --min-count"
UNDECODABLE_IMAGES = "images that cannot be decoded"
OTHER_KINDS = "of other kinds"
MAX_KINDS = 30
MAX_KIND_CHARACTERS = 60


def count_used_and_unused_files(
    class_ids: Sequence[str],
    labels_by_split: Mapping[str, npt.NDArray[np.int32]],
    selection: SampleSelection,
    undecodable_positions_by_split: Mapping[str, npt.NDArray[np.int64]],
    unused_file_counts_by_kind: Mapping[str, int],
) -> FileCounts:
    """Count the used samples of a source and its unused files, by kind.

    Parameters
    ----------
    class_ids : sequence of str
        Of the source.
    labels_by_split : mapping of str to ndarray of int32
        Index into `class_ids` of every sample that the source has.
    selection : SampleSelection
        The samples in use.
    undecodable_positions_by_split : mapping of str to ndarray of int64
        Positions of samples that cannot be decoded.
    unused_file_counts_by_kind : mapping of str to int
        Number of files that are not samples, by kind.
    """
    unused = Counter(unused_file_counts_by_kind)
    is_used_class = np.isin(class_ids, selection.class_ids)
    used = 0
    for split, split_labels in labels_by_split.items():
        is_unused = selection.labels_by_split[split] == UNUSED_LABEL
        used += int(np.count_nonzero(~is_unused))
        is_unused[undecodable_positions_by_split[split]] = False
        unused[UNDECODABLE_IMAGES] += len(undecodable_positions_by_split[split])
        unused[LIMITED_IMAGES] += int(np.count_nonzero(is_unused & is_used_class[split_labels]))
        unused[SMALL_CLASS_IMAGES] += int(np.count_nonzero(is_unused & ~is_used_class[split_labels]))
    return make_bounded_file_counts(used, unused)


def make_bounded_file_counts(
    used_file_count: int, unused_file_counts_by_kind: Mapping[str, int]
) -> FileCounts:
    """Return counts with a bounded number of short, printable kinds.

    Kinds derive from file names: they may hold any bytes, and there may be as many as files.
    """
    kinds: Counter[str] = Counter()
    for rank, (kind, count) in enumerate(
        sorted(unused_file_counts_by_kind.items(), key=lambda item: (-item[1], item[0]))
    ):
        if count:
            kinds[sanitize_line(kind, MAX_KIND_CHARACTERS) if rank < MAX_KINDS else OTHER_KINDS] += count
    return FileCounts(
        found=used_file_count + kinds.total(), used=used_file_count, unused=dict(sorted(kinds.items()))
    )


def describe_file_counts(file_counts: FileCounts) -> str:
    """Return one line with the files found, used, and not used, by kind."""
    line = f"{file_counts.found:,} files found, {file_counts.used:,} used"
    if file_counts.unused:
        line += (
            f", {sum(file_counts.unused.values()):,} not used: {format_counts_by_kind(file_counts.unused)}"
        )
    return line
