"""Gradients of a whole batch, put together from those of its micro-batches, for tests to compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfm.distill.train_step import ImageBatch


@dataclass(frozen=True)
class BatchGradients:
    """A loss, the features of all images, and the gradient with respect to every level."""

    loss: float
    features: Tensor
    levels: list[Tensor]


def collect_gradients(
    compute: Callable[..., tuple[float, Tensor]], batch: ImageBatch, *arguments: Any
) -> BatchGradients:
    """Call a function that passes gradients to a callback, and put them together."""
    levels = [torch.full_like(level, torch.nan) for level in batch.levels]

    def copy_gradients(images: slice, gradients: list[Tensor]) -> None:
        for level, gradient in zip(levels, gradients, strict=True):
            assert level[images].isnan().all(), "called twice for one image"
            level[images] = gradient

    loss, features = compute(batch, *arguments, copy_gradients)
    return BatchGradients(loss, features, levels)
