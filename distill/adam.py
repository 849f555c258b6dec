"""Adam for a slice of the images at a time. Updates are elementwise, so slices may come in any order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class AdamState:
    """Optimizer state of Adam for a pyramid.

    Attributes
    ----------
    first_moments, second_moments : list of Tensor, shapes (N, 3, r, r)
        Decaying means of the gradient and of its square, for every level.
    step_count : int
        Number of steps since initialisation.
    """

    first_moments: list[Tensor]
    second_moments: list[Tensor]
    step_count: int


def init_adam(levels: Sequence[Tensor]) -> AdamState:
    """Return the state before the first step: zeros of the shapes of the levels."""
    return AdamState([torch.zeros_like(x) for x in levels], [torch.zeros_like(x) for x in levels], 0)


def adam_step(
    levels: Sequence[Tensor],
    state: AdamState,
    learning_rate: float,
    image_slice: slice,
    gradients: Sequence[Tensor],
) -> None:
    """Update some images; the caller raises `state.step_count` once all images are updated.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        Changed in place, as the state is.
    state : AdamState
    learning_rate : float
    image_slice : slice
        Which images.
    gradients : sequence of Tensor, shapes (images, 3, r, r)
        Contiguous, as the levels are.
    """
    adam(
        [level.detach()[image_slice] for level in levels],
        list(gradients),
        [moment[image_slice] for moment in state.first_moments],
        [moment[image_slice] for moment in state.second_moments],
        [],
        [torch.full((), float(state.step_count), device=level.device) for level in levels],
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=learning_rate,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )
