"""The training protocol that all modes share: which view when, batches, optimizer, learning rate."""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.random_streams import make_rng

LARGEST_BATCH = 100
RATE_AT_256 = 256

Told = Callable[[int, int], None]
"""Takes how much is done, and of how much."""


def nobody_told(done: int, total: int) -> None:
    """Take no notice."""


class Purpose(enum.IntEnum):
    """What a random make_rng is for; numbers no other stage uses, so that equal seeds share no numbers."""

    VIEWS = 1001
    ORDER = 1002
    BATCHES = 1003
    HEAD = 1004
    PROJECTOR = 1005
    EXEMPLARS = 1006


@dataclass(frozen=True)
class Plan:
    """What every seed looks at, in order.

    Attributes
    ----------
    image : Tensor of int32, shape (seed, epoch, image)
        Row of the pool; every image of a seed once per epoch.
    view : Tensor of int32, shape (seed, epoch, image)
        Which of its views.
    batch : int
        Images per step: ``min(100, images)``.
    """

    image: Tensor
    view: Tensor
    batch: int

    @property
    def seeds(self) -> int:
        """How many are trained side by side."""
        return self.image.shape[0]

    @property
    def epochs(self) -> int:
        """Passes over the images."""
        return self.image.shape[1]


def lay_out(seed: int, rows: npt.NDArray[np.int64], *, epochs: int, views: int) -> Plan:
    """Lay out a training: every epoch shows every image of a seed once, through one of its views.

    An image's views are gone through in random order before any is used again, so with at least as many
    views as epochs no view is used twice. Images are shuffled where they do not fit one batch.

    Parameters
    ----------
    seed : int
        Of the run; seed number s of the repetitions has its own streams below it.
    rows : ndarray of int64, shape (seed, image)
        Rows of the pool that each repetition trains on.
    epochs, views : int
        Passes over the images; views per image in the pool.

    Returns
    -------
    Plan
        On the CPU.
    """
    seeds, images = rows.shape
    rounds = math.ceil(epochs / views)
    view = np.empty((seeds, epochs, images), dtype=np.int32)
    order = np.broadcast_to(np.arange(images), view.shape)
    batch = min(LARGEST_BATCH, images)
    if images > batch:
        order = np.stack(
            [make_rng(seed, Purpose.BATCHES, s).permuted(order[s], axis=1) for s in range(seeds)]
        )
    for s in range(seeds):
        every = np.broadcast_to(np.arange(views, dtype=np.int32), (rounds, images, views))
        shuffled = make_rng(seed, Purpose.ORDER, s).permuted(every, axis=2)
        view[s] = shuffled.transpose(0, 2, 1).reshape(rounds * views, images)[:epochs]
    image = np.take_along_axis(np.broadcast_to(rows[:, None].astype(np.int32), view.shape), order, axis=2)
    return Plan(torch.from_numpy(image), torch.from_numpy(np.take_along_axis(view, order, axis=2)), batch)


def normal(seed: int, purpose: Purpose, shape: tuple[int, ...], deviation: float) -> Tensor:
    """Draw initial weights, one make_rng per seed: what a seed starts from does not depend on the others.

    Parameters
    ----------
    seed : int
        Of the run.
    shape : tuple of int
        The first axis counts the seeds.
    deviation : float
        Standard deviation; the mean is zero.

    Returns
    -------
    Tensor, float32
    """
    drawn = [make_rng(seed, purpose, s).standard_normal(shape[1:], dtype=np.float32) for s in range(shape[0])]
    return torch.from_numpy(np.stack(drawn) * np.float32(deviation))


@contextmanager
def at_most_threads(count: int) -> Iterator[int]:
    """Let torch use fewer CPU threads for a while; gives the number it used before.

    Small operations gain nothing from a second thread, and where cores are shared they wait for it at every
    one of a training's thousands of barriers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at one learning rate.

    Attributes
    ----------
    parameters : sequence of Tensor
        Changed in place. All seeds side by side along the first axis: Adam works on each number alone, so
        this is exactly one training per seed.
    rate : float
        Learning rate at a batch of 256 images.
    """

    parameters: Sequence[Tensor]
    rate: float


def descend(
    groups: Sequence[Group],
    gradients: Callable[[Tensor, Tensor], Sequence[Tensor]],
    plan: Plan,
    on_epoch: Told,
) -> None:
    """Train by Adam, learning rate ``rate * batch / 256`` falling to zero along a cosine, no weight decay.

    Parameters
    ----------
    groups : sequence of Group
    gradients : callable
        Given the pool rows and the views of a batch, both of shape (seed, batch), the gradient of each
        seed's loss with respect to the parameters of the first group, then those of the second, ...
    plan : Plan
    on_epoch : callable
        Told the epochs done and how many there are, after each.
    """
    rated: list[dict[str, Any]] = [
        {"params": list(group.parameters), "lr": group.rate * plan.batch / RATE_AT_256} for group in groups
    ]
    optimizer = torch.optim.Adam(rated, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plan.epochs)
    parameters = [parameter for group in groups for parameter in group.parameters]
    device = parameters[0].device
    image, view = plan.image.to(device), plan.view.to(device)
    for epoch in range(plan.epochs):
        batches = zip(
            torch.split(image[:, epoch], plan.batch, 1),
            torch.split(view[:, epoch], plan.batch, 1),
            strict=True,
        )
        for rows, looks in batches:
            for parameter, gradient in zip(parameters, gradients(rows, looks), strict=True):
                parameter.grad = gradient
            optimizer.step()
        cosine.step()
        on_epoch(epoch + 1, plan.epochs)
