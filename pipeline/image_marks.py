"""Count the images of an entry that were composited over a background or are dark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.backbones.rendering import Rendering
from sfm.pipeline.staged_features import StagedPartition
from sfm.pipeline.task_results import IMAGE_MARKS, TaskResult


@dataclass(frozen=True)
class ImageMarkCount:
    """Number of images of an entry that have a mark, and the location of one of them, if known."""

    count: int = 0
    example_location: str = ""


def make_rendering_entry_options(rendering: Rendering, has_composited: bool) -> dict[str, Any]:
    """Return the options of an entry for how its images became opaque 8-bit pixels.

    The background is included only if images were composited: it does not change opaque images.
    """
    options: dict[str, Any] = {"background": rendering.background} if has_composited else {}
    return options if rendering.white is None else options | {"white": rendering.white}


def make_masks_by_image_mark(result: TaskResult) -> dict[str, npt.NDArray[np.bool_]]:
    """Return, by mark, a mask of the staged samples of a task; unused marks are left out."""
    return {mark: np.isin(result.kept, places) for mark, places in result.marked.items()}


def count_samples_by_image_mark(
    partitions_and_masks: Iterable[tuple[Sequence[StagedPartition], npt.NDArray[np.bool_]]],
) -> dict[str, ImageMarkCount]:
    """Count the samples in use by mark.

    Parameters
    ----------
    partitions_and_masks : iterable of (sequence of StagedPartition, ndarray of bool)
        Partitions, and a mask of their samples in use.
    """
    count, example = dict.fromkeys(IMAGE_MARKS, 0), dict.fromkeys(IMAGE_MARKS, "")
    for partitions, in_use in partitions_and_masks:
        start = 0
        for partition in partitions:
            is_used = in_use[start : start + len(partition.positions_in_split)]
            start += len(partition.positions_in_split)
            for mark, mask in partition.masks_by_image_mark.items():
                used_count = int((mask & is_used).sum())
                count[mark] += used_count
                if used_count and is_used[mask][0]:
                    example[mark] = example[mark] or partition.example_locations_by_image_mark[mark]
    return {mark: ImageMarkCount(count[mark], example[mark]) for mark in IMAGE_MARKS}
