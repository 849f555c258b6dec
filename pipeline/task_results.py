"""Results of tasks, which the staging folder keeps as JSON."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.sources.limits import MAX_NAME_CHARACTERS


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be decoded.

    Attributes
    ----------
    place : int
        Index among the samples that the task read.
    where, why : str
    """

    place: int
    where: str
    why: str


IMAGE_MARKS = ("composited", "dark")
"""Properties of single images that are counted, see `sfm.backbones.rendering.RenderedImage`."""


@dataclass(frozen=True)
class TaskResult:
    """The result of reading a task; the attributes are the keys of its JSON file.

    Attributes
    ----------
    read : int
        Number of samples that were read.
    kept : list of int
        Indices, among those, of the samples whose features are staged.
    skipped : list of SkippedSample
        Samples that could not be decoded.
    classes : list of str
        Ids of the classes in order of appearance; empty where labels were known.
    labels : list of int
        Per sample read, index into `classes`.
    marked : dict of str to list of int
        Indices of the samples that have one of `IMAGE_MARKS`.
    examples : dict of str to str
        Location of the first of them, for messages.
    unused : dict of str to int
        Number of other files, by kind.
    written : list of list of str
        Per class, the spellings of its labels; see `Sample.numeric_label_text`.
    """

    read: int
    kept: list[int]
    skipped: list[SkippedSample]
    classes: list[str]
    labels: list[int]
    marked: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    written: list[list[str]] = field(default_factory=list)


TASK_RESULT_ADAPTER: TypeAdapter[TaskResult] = TypeAdapter(TaskResult)
MAX_TASK_RESULT_BYTES = 2**27
"""Maximum size of a result, enough for the largest shard."""


def is_plausible_result(result: TaskResult, task: PartitionTask) -> bool:
    """Return whether a result is plausible for a task: its file is untrusted."""
    kept, read = np.array(result.kept, dtype=np.int64), result.read
    skipped = [sample.place for sample in result.skipped]
    labels = np.array(result.labels, dtype=np.int64)
    known = task.positions_in_split is not None
    return (
        read >= 0
        and (task.positions_in_split is None or read == len(task.positions_in_split))
        and len(labels) == (0 if known else read)
        and are_ascending_indices(kept, read)
        and are_ascending_indices(np.array(skipped, dtype=np.int64), read)
        and not set(skipped).intersection(result.kept)
        and bool(((labels >= 0) & (labels < len(result.classes))).all())
        and len(set(result.classes)) == len(result.classes)
        and all(0 < len(class_id) <= MAX_NAME_CHARACTERS for class_id in result.classes)
        and set(result.marked) <= set(IMAGE_MARKS) & set(result.examples)
        and all(are_ascending_indices(np.array(own, dtype=np.int64), read) for own in result.marked.values())
        and all(count >= 0 for count in result.unused.values())
    )


def are_ascending_indices(indices: npt.NDArray[np.int64], list_length: int) -> bool:
    """Return whether these are distinct, ascending indices into a list of a length."""
    inside = bool(((indices >= 0) & (indices < list_length)).all())
    return inside and bool((np.diff(indices) > 0).all())
