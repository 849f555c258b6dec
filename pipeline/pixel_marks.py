"""Which images of an entry were composited over a background or are dark, and what its key has of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.backbones.rendering import Rendering
from sfm.pipeline.staging import IMAGE_MARKS, StagedPartition, TaskResult


@dataclass(frozen=True)
class MarkCount:
    """How many images of an entry have a mark, and what names one of them, if one is known."""

    count: int = 0
    example: str = ""


def make_rendering_options(rendering: Rendering, composited: bool) -> dict[str, Any]:
    """Return what the options of an entry say about how its images became opaque 8-bit pixels.

    Of opaque images the background is no part of it: whatever it is, their pixels are the same.
    """
    options: dict[str, Any] = {"background": rendering.background} if composited else {}
    return options if rendering.white is None else options | {"white": rendering.white}


def find_marked_rows(found: TaskResult) -> dict[str, npt.NDArray[np.bool_]]:
    """Return, by mark, which of the staged samples of a task have it; marks that none has are left out."""
    return {mark: np.isin(found.kept, places) for mark, places in found.marked.items()}


def count_marks(
    rows: Iterable[tuple[Sequence[StagedPartition], npt.NDArray[np.bool_]]],
) -> dict[str, MarkCount]:
    """Count, by mark, the samples that have it.

    Parameters
    ----------
    rows : iterable of (sequence of Partition, ndarray of bool)
        Partitions, and which of all their samples are in use.
    """
    count, example = dict.fromkeys(IMAGE_MARKS, 0), dict.fromkeys(IMAGE_MARKS, "")
    for partitions, in_use in rows:
        start = 0
        for partition in partitions:
            used = in_use[start : start + len(partition.samples)]
            start += len(partition.samples)
            for mark, has in partition.marked.items():
                number = int((has & used).sum())
                count[mark] += number
                if number and used[has][0]:
                    example[mark] = example[mark] or partition.examples[mark]
    return {mark: MarkCount(count[mark], example[mark]) for mark in IMAGE_MARKS}
