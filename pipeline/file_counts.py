"""What became of the files of a dataset: found, used, and not used, by kind."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sfm.pipeline.selection import UNUSED_LABEL, SampleSelection
from sfm.pipeline.sources.inventory import format_counts
from sfm.stats_store.cards import FileCounts
from sfm.text import sanitize_line

LIMITED_IMAGES = "images beyond --limit-per-class"
SMALL_CLASS_IMAGES = "images of classes below --min-count"
UNDECODABLE_IMAGES = "images that cannot be decoded"
OTHER_KINDS = "of other kinds"
MAX_KINDS = 30
MAX_KIND_CHARACTERS = 60


def count_files(
    class_ids: Sequence[str],
    labels: Mapping[str, npt.NDArray[np.int32]],
    selection: SampleSelection,
    unreadable: Mapping[str, npt.NDArray[np.int64]],
    beside: Mapping[str, int],
) -> FileCounts:
    """Count what is in use of a source, and what is not, by kind.

    Parameters
    ----------
    class_ids : sequence of str
        Of the source.
    labels : mapping of str to ndarray of int32
        By split, index into `class_ids` of every sample that the source has.
    selection : Selection
        The samples in use.
    unreadable : mapping of str to ndarray of int64
        By split, positions of samples that cannot be decoded.
    beside : mapping of str to int
        Files that are no samples, by kind.
    """
    unused = Counter(beside)
    in_class = np.isin(class_ids, selection.class_ids)
    used = 0
    for split, own in labels.items():
        out = selection.labels[split] == UNUSED_LABEL
        used += int(np.count_nonzero(~out))
        out[unreadable[split]] = False
        unused[UNDECODABLE_IMAGES] += len(unreadable[split])
        unused[LIMITED_IMAGES] += int(np.count_nonzero(out & in_class[own]))
        unused[SMALL_CLASS_IMAGES] += int(np.count_nonzero(out & ~in_class[own]))
    return make_file_counts(used, unused)


def make_file_counts(used: int, unused: Mapping[str, int]) -> FileCounts:
    """Return counts whose kinds any text file and terminal can hold, and of which there are not too many.

    Kinds are made of the names of files: any bytes, and as many kinds as there are files if their names end
    in numbers.
    """
    kinds: Counter[str] = Counter()
    for number, (kind, count) in enumerate(sorted(unused.items(), key=lambda item: (-item[1], item[0]))):
        if count:
            kinds[sanitize_line(kind, MAX_KIND_CHARACTERS) if number < MAX_KINDS else OTHER_KINDS] += count
    return FileCounts(found=used + kinds.total(), used=used, unused=dict(sorted(kinds.items())))


def describe_file_counts(files: FileCounts) -> str:
    """Return one line: how many files were found, used, and not used, by kind."""
    line = f"{files.found:,} files found, {files.used:,} used"
    if files.unused:
        line += f", {sum(files.unused.values()):,} not used: {format_counts(files.unused)}"
    return line
