"""Gradients as tests compare them: of all images at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfm.distill.gradient import Batch, Sight


@dataclass(frozen=True)
class Slope:
    """A loss, the features that it was computed from, and its gradient with respect to every level."""

    loss: float
    features: Tensor
    levels: list[Tensor]


def gathered(pull: Callable[..., Sight], batch: Batch, *arguments: Any) -> Slope:
    """Call one of the functions that give gradients away, and put what they give together."""
    levels = [torch.full_like(level, torch.nan) for level in batch.levels]

    def take(part: slice, gradients: list[Tensor]) -> None:
        for level, gradient in zip(levels, gradients, strict=True):
            assert level[part].isnan().all(), "given away twice"
            level[part] = gradient

    sight = pull(batch, *arguments, take)
    return Slope(sight.loss, sight.features, levels)
