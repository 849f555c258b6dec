"""The training protocol that all modes share: batch schedule, optimizer, learning rate, random streams."""

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

MAX_BATCH_SIZE = 100
REFERENCE_BATCH_SIZE = 256

CountCallback = Callable[[int, int], None]
"""Called with the number of finished epochs, blocks or views, and their total."""

PreviousThreadCount = int


def ignore_progress_count(done_count: int, total_count: int) -> None:
    """Do nothing: the default :data:`CountCallback`."""


class RandomStreamPurpose(enum.IntEnum):
    """Purposes of random streams; no other stage uses these numbers, so equal seeds share no numbers."""

    VIEWS = 1001
    ORDER = 1002
    BATCHES = 1003
    HEAD = 1004
    PROJECTOR = 1005
    EXEMPLARS = 1006


@dataclass(frozen=True)
class BatchSchedule:
    """The images and views that every seed trains on, in order.

    Attributes
    ----------
    image_indices : Tensor of int32, shape (seed, epoch, image)
        Indices of images; every image of a seed once per epoch.
    view_indices : Tensor of int32, shape (seed, epoch, image)
        Indices of their views.
    batch_size : int
        Images per step: ``min(100, images)``.
    """

    image_indices: Tensor
    view_indices: Tensor
    batch_size: int

    @property
    def seed_count(self) -> int:
        """Number of seeds that are trained side by side."""
        return self.image_indices.shape[0]

    @property
    def epoch_count(self) -> int:
        """Passes over the images."""
        return self.image_indices.shape[1]


def make_batch_schedule(
    run_seed: int, image_indices_by_seed: npt.NDArray[np.int64], *, epoch_count: int, views_per_image: int
) -> BatchSchedule:
    """Return a schedule in which every epoch shows every image of a seed once, through one of its views.

    All views of an image are used in random order before any is used again, so with at least as many views as
    epochs no view is used twice. Images are shuffled where they do not fit one batch.

    Parameters
    ----------
    run_seed : int
        Seed of the run; every repetition has separate streams below it.
    image_indices_by_seed : ndarray of int64, shape (seed, image)
        Indices of the images that each repetition trains on.
    epoch_count, views_per_image : int
        Passes over the images; views per image.

    Returns
    -------
    BatchSchedule
        On the CPU.
    """
    seeds, images = image_indices_by_seed.shape
    rounds = math.ceil(epoch_count / views_per_image)
    view_indices = np.empty((seeds, epoch_count, images), dtype=np.int32)
    order = np.broadcast_to(np.arange(images), view_indices.shape)
    batch_size = min(MAX_BATCH_SIZE, images)
    if images > batch_size:
        order = np.stack(
            [
                make_rng(run_seed, RandomStreamPurpose.BATCHES, s).permuted(order[s], axis=1)
                for s in range(seeds)
            ]
        )
    for s in range(seeds):
        unshuffled = np.broadcast_to(
            np.arange(views_per_image, dtype=np.int32), (rounds, images, views_per_image)
        )
        shuffled = make_rng(run_seed, RandomStreamPurpose.ORDER, s).permuted(unshuffled, axis=2)
        view_indices[s] = shuffled.transpose(0, 2, 1).reshape(rounds * views_per_image, images)[:epoch_count]
    every_epoch = np.broadcast_to(image_indices_by_seed[:, None].astype(np.int32), view_indices.shape)
    return BatchSchedule(
        torch.from_numpy(np.take_along_axis(every_epoch, order, axis=2)),
        torch.from_numpy(np.take_along_axis(view_indices, order, axis=2)),
        batch_size,
    )


def draw_initial_weights_by_seed(
    run_seed: int, purpose: RandomStreamPurpose, shape: tuple[int, ...], std: float
) -> Tensor:
    """Draw initial weights, one stream per seed: the weights of one seed do not depend on the others.

    Parameters
    ----------
    run_seed : int
        Seed of the run.
    purpose : RandomStreamPurpose
    shape : tuple of int
        The first axis counts the seeds.
    std : float
        Standard deviation; the mean is zero.

    Returns
    -------
    Tensor, float32
    """
    drawn = [
        make_rng(run_seed, purpose, s).standard_normal(shape[1:], dtype=np.float32) for s in range(shape[0])
    ]
    return torch.from_numpy(np.stack(drawn) * np.float32(std))


@contextmanager
def limit_torch_threads(max_threads: int) -> Iterator[PreviousThreadCount]:
    """Limit torch to `max_threads` CPU threads; yield the previous number.

    Small operations gain nothing from a second thread, and where cores are shared they wait for it at every
    one of a training's thousands of barriers.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(min(max_threads, previous))
    try:
        yield previous
    finally:
        torch.set_num_threads(previous)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are trained at one learning rate.

    Attributes
    ----------
    parameters : sequence of Tensor
        Changed in place. All seeds side by side along the first axis: Adam works on each number alone, so
        this is exactly one training per seed.
    learning_rate_at_batch_256 : float
        In proportion to the batch otherwise.
    """

    parameters: Sequence[Tensor]
    learning_rate_at_batch_256: float


def train_with_adam(
    param_groups: Sequence[ParamGroup],
    compute_gradients_at_indices: Callable[[Tensor, Tensor], Sequence[Tensor]],
    schedule: BatchSchedule,
    on_epoch: CountCallback,
) -> None:
    """Train by Adam, learning rate ``rate * batch / 256`` falling to zero along a cosine, no weight decay.

    Parameters
    ----------
    param_groups : sequence of ParamGroup
    compute_gradients_at_indices : callable
        Takes the image and view indices of a batch, both of shape (seed, batch). Returns the gradient of each
        seed's loss with respect to the parameters of the first group, then those of the second, ...
    schedule : BatchSchedule
    on_epoch : callable
        Called after each epoch with the epochs done and their total.
    """
    batch_size = schedule.batch_size
    optimizer_groups: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "lr": group.learning_rate_at_batch_256 * batch_size / REFERENCE_BATCH_SIZE,
        }
        for group in param_groups
    ]
    optimizer = torch.optim.Adam(optimizer_groups, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=schedule.epoch_count)
    parameters = [parameter for group in param_groups for parameter in group.parameters]
    device = parameters[0].device
    image_indices, view_indices = schedule.image_indices.to(device), schedule.view_indices.to(device)
    for epoch in range(schedule.epoch_count):
        batches = zip(
            torch.split(image_indices[:, epoch], batch_size, 1),
            torch.split(view_indices[:, epoch], batch_size, 1),
            strict=True,
        )
        for batch_images, batch_views in batches:
            gradients = compute_gradients_at_indices(batch_images, batch_views)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        scheduler.step()
        on_epoch(epoch + 1, schedule.epoch_count)
