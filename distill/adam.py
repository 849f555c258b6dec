"""Adam, some images at a time: it moves every value by itself, so none has to wait for the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class Moments:
    """What Adam remembers of the gradients of a pyramid.

    Attributes
    ----------
    first, second : list of Tensor, shapes (N, 3, r, r)
        Decaying means of the gradient and of its square, for every level.
    age : int
        Steps done since they were zero.
    """

    first: list[Tensor]
    second: list[Tensor]
    age: int


def no_moments(levels: Sequence[Tensor]) -> Moments:
    """Return the moments before the first step: zeros of the shapes of the levels."""
    return Moments([torch.zeros_like(x) for x in levels], [torch.zeros_like(x) for x in levels], 0)


def descend(
    levels: Sequence[Tensor], moments: Moments, learning_rate: float, part: slice, gradients: Sequence[Tensor]
) -> None:
    """Do the step of some images; the age of the moments is left to who has moved all of them.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        Changed in their place, as the moments are.
    moments : Moments
    learning_rate : float
    part : slice
        Which images.
    gradients : sequence of Tensor, shapes (images, 3, r, r)
        Contiguous, as the levels are.
    """
    adam(
        [level.detach()[part] for level in levels],
        list(gradients),
        [moment[part] for moment in moments.first],
        [moment[part] for moment in moments.second],
        [],
        [torch.full((), float(moments.age), device=level.device) for level in levels],
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=learning_rate,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )
