"""The gradient of the loss with respect to the pyramids, with the activations of a few images in memory.

The loss sees the images through their features alone, C * K * A vectors that fit anywhere. So the images can
be looked at in micro-batches, however many classes there are, in one of two ways:

exact
    Forward without a graph for all features; the loss and its gradient with respect to them; then forward
    and backward of each micro-batch, through the same views. One forward more, and the gradient of the whole
    batch.
one-pass
    Forward and backward once per micro-batch; the features of the images not in it are those last seen, in
    this step or the one before. The gradient lags behind by less than a step.

The same holds for images of other processes: once per step, all processes learn all features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.distill.augment import Views, augment
from sfm.distill.group import ALONE, Group
from sfm.distill.pyramid import decode

Gradient = Literal["exact", "one-pass"]

Objective = Callable[[Tensor], Tensor]
"""From features of shape (C, K, A, D) to a loss of shape ()."""


@dataclass(frozen=True)
class Batch:
    """The images of a step that are this process's, and how they are looked at.

    Attributes
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        The pyramids: images of the first class first. One process has all of them, N = C * K.
    canvas, image_size : int
        Sides of the images and of their views, in pixels.
    views : Views
        Of N * A views: those of the first image first.
    shape : tuple of int
        C, K and A, of all images.
    group : Group
        The processes that share them.
    """

    levels: Sequence[Tensor]
    canvas: int
    image_size: int
    views: Views
    shape: tuple[int, int, int]
    group: Group = ALONE

    @property
    def images(self) -> int:
        """How many images this process has, N."""
        return len(self.levels[0])

    @property
    def own(self) -> slice:
        """The place of this process's features among those of all images."""
        classes, ipc, views = self.shape
        return self.group.share(classes, ipc * views)

    def everyones(self, features: Tensor) -> Tensor:
        """Return the features of all images, shape (C * K * A, D), from each process's own."""
        classes, ipc, views = self.shape
        return self.group.everyones(features, self.own, classes * ipc * views)


@dataclass(frozen=True)
class Slope:
    """A loss and its gradient.

    Attributes
    ----------
    loss : float
    levels : list of Tensor
        Gradient with respect to every level, of the level's shape.
    features : Tensor, shape (C * K * A, D)
        Of all images as they are, through the views of this step.
    """

    loss: float
    levels: list[Tensor]
    features: Tensor


def slope(
    batch: Batch,
    backbone: Backbone,
    objective: Objective,
    micro_batch: int,
    gradient: Gradient,
    seen: Tensor | None,
) -> Slope:
    """Return the loss of all images and its gradient.

    Parameters
    ----------
    batch : Batch
    backbone : Backbone
    objective : callable
    micro_batch : int
        Images whose activations are in memory at a time.
    gradient : {"exact", "one-pass"}
        What to do about the others, if there are any.
    seen : Tensor, shape (C * K * A, D), or None
        Features of the step before, for "one-pass"; where there are none, the gradient is exact.
    """
    if micro_batch >= batch.images:
        return whole_slope(batch, backbone, objective)
    if gradient == "one-pass" and seen is not None:
        return one_pass_slope(batch, backbone, objective, micro_batch, seen)
    return exact_slope(batch, backbone, objective, micro_batch)


def features_of(batch: Batch, backbone: Backbone, levels: Sequence[Tensor], part: slice) -> Tensor:
    """Look at some images through their views.

    Parameters
    ----------
    batch : Batch
    backbone : Backbone
    levels : sequence of Tensor
        The pyramids of those images alone; differentiable.
    part : slice
        Which images of the batch they are.

    Returns
    -------
    Tensor, shape (images * A, D)
    """
    each = batch.shape[2]
    views = batch.views.part(slice(part.start * each, part.stop * each))
    return backbone.features(augment(decode(levels, batch.canvas), views, batch.image_size))


def whole_slope(batch: Batch, backbone: Backbone, objective: Objective) -> Slope:
    """Return the gradient from one graph over all images of this process."""
    features = features_of(batch, backbone, batch.levels, slice(0, batch.images))
    loss, pull, known = pulled(batch, objective, features.detach())
    # Laid out as the levels are: torch's fused Adam reads gradients in the order of memory.
    levels = [each.contiguous() for each in torch.autograd.grad(features, batch.levels, pull)]
    return Slope(loss.item(), levels, known)


def exact_slope(batch: Batch, backbone: Backbone, objective: Objective, micro_batch: int) -> Slope:
    """Return the same gradient, from the features of all images and one graph per micro-batch."""
    with torch.no_grad():
        features = torch.cat(
            [
                features_of(batch, backbone, [level[part] for level in batch.levels], part)
                for part in parts(batch.images, micro_batch)
            ]
        )
    loss, pull, known = pulled(batch, objective, features)
    gradients = [torch.empty_like(level) for level in batch.levels]
    each = batch.shape[2]
    for part in parts(batch.images, micro_batch):
        leaves = leaves_of(batch, part)
        again = features_of(batch, backbone, leaves, part)
        fill(gradients, part, torch.autograd.grad(again, leaves, pull[part.start * each : part.stop * each]))
    return Slope(loss.item(), gradients, known)


def pulled(batch: Batch, objective: Objective, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, how it pulls at this process's features, and the features of all images.

    Parameters
    ----------
    batch : Batch
    objective : callable
    features : Tensor, shape (N * A, D)
        Of this process's images; without a graph.

    Returns
    -------
    loss : Tensor, shape ()
    pull : Tensor, shape (N * A, D)
        Gradient of the loss.
    known : Tensor, shape (C * K * A, D)
    """
    known = batch.everyones(features).requires_grad_()
    loss = objective(known.view(*batch.shape, -1))
    (pull,) = torch.autograd.grad(loss, known)
    return loss.detach(), pull[batch.own], known.detach()


def one_pass_slope(
    batch: Batch, backbone: Backbone, objective: Objective, micro_batch: int, seen: Tensor
) -> Slope:
    """Return the gradient from one graph per micro-batch, among the features last seen of all others."""
    features = seen.clone()
    gradients = [torch.empty_like(level) for level in batch.levels]
    each, first = batch.shape[2], batch.own.start
    for part in parts(batch.images, micro_batch):
        leaves = leaves_of(batch, part)
        fresh = features_of(batch, backbone, leaves, part)
        begin, end = first + part.start * each, first + part.stop * each
        among = torch.cat([features[:begin], fresh, features[end:]])
        fill(gradients, part, torch.autograd.grad(objective(among.view(*batch.shape, -1)), leaves))
        features[begin:end] = fresh.detach()
    known = batch.everyones(features[batch.own])
    return Slope(objective(known.view(*batch.shape, -1)).item(), gradients, known)


def parts(images: int, micro_batch: int) -> Iterator[slice]:
    """Cut images into micro-batches."""
    return (slice(start, min(start + micro_batch, images)) for start in range(0, images, micro_batch))


def leaves_of(batch: Batch, part: slice) -> list[Tensor]:
    """Return the pyramids of some images as leaves: a gradient with respect to them is of their size."""
    return [level.detach()[part].requires_grad_() for level in batch.levels]


def fill(gradients: Sequence[Tensor], part: slice, values: Sequence[Tensor]) -> None:
    """Put the gradients of some images in their place."""
    for gradient, value in zip(gradients, values, strict=True):
        gradient[part] = value
