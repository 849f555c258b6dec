"""Cut an extraction into tasks; each becomes one partition in the staging folder."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.pipeline.selection import SampleSelection
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.sources.source import Shard
from sfm.stats_store.digests import BLOCK_ROWS

MAX_TASK_ROWS = BLOCK_ROWS


@dataclass(frozen=True)
class PartitionTask:
    """Samples that one worker reads in order; they become one partition.

    Attributes
    ----------
    split : str
    number : int
        Of the partition; where labels are not known, also of the shard.
    positions_in_split : ndarray of int64, shape (n,), or None
        Ascending; None for a whole shard whose labels are known only once it is read.
    """

    split: str
    number: int
    positions_in_split: npt.NDArray[np.int64] | None

    @property
    def name(self) -> str:
        """Name of the partition's files."""
        return f"{self.split}-{self.number:06d}"

    def iterate_samples(self, source: Source) -> Iterator[Sample | SampleFile]:
        """Yield the samples; those that are files of their own are not read."""
        return (
            self.get_shard(source).read(None)
            if self.positions_in_split is None
            else source.splits[self.split].iter_samples(self.positions_in_split)
        )

    def get_shard(self, source: Source) -> Shard:
        """Return the shard that the task reads, where labels are not known."""
        return source.splits[self.split].shards[self.number]


def make_tasks(source: Source, selection: SampleSelection | None) -> list[PartitionTask]:
    """Cut both splits into tasks; equal sources and selections give equal tasks.

    In a split whose samples are all in use, every shard is a task: many kinds of source are fastest that
    way. In other splits, the samples in use are cut into tasks of ``MAX_TASK_ROWS``. Where labels are not
    known, there is no selection yet, and every shard is a task.
    """
    tasks: list[PartitionTask] = []
    for name, split in source.splits.items():
        if selection is None:
            tasks += [PartitionTask(name, number, None) for number in range(len(split.shards))]
            continue
        rows = selection.list_used_positions(name)
        is_whole = len(rows) == len(selection.labels_by_split[name])
        shard_sizes = [0 if shard.labels is None else len(shard.labels) for shard in split.shards]
        cuts = np.cumsum(shard_sizes)[:-1] if is_whole else np.arange(MAX_TASK_ROWS, len(rows), MAX_TASK_ROWS)
        pieces = [piece for piece in np.split(rows, cuts) if len(piece)]
        tasks += [PartitionTask(name, number, piece) for number, piece in enumerate(pieces)]
    return tasks
