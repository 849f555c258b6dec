"""The gradient of the loss with respect to the pyramids, a few images at a time.

The loss sees the images through their features alone, C * K * A vectors that fit anywhere. So the images can
be looked at in micro-batches, however many classes there are, in one of two ways:

exact
    Forward for all features; the loss and its gradient with respect to them; then backward of each
    micro-batch, the last one first. The graphs of the last images are kept in between; the others, of which
    only the features are, go forward once more, through the same views. Either way it is the gradient of the
    whole batch.
one-pass
    Forward and backward once per micro-batch; the features of the images not in it are those last seen, in
    this step or the one before. The gradient lags behind by less than a step.

The same holds for images of other processes: once per step, all processes learn all features.

A gradient is as large as the pyramids. So it is given away micro-batch by micro-batch, and nobody holds all
of it.
"""

import math
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

Take = Callable[[slice, list[Tensor]], None]
"""Takes which images of the batch, and the gradient with respect to each of their levels."""


class NotFinite(ArithmeticError):  # noqa: N818 - named for what the loss is
    """The loss is not finite, so nothing is pulled by it."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss


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
class Cut:
    """How the images of a process are gone through.

    Attributes
    ----------
    micro_batch : int
        Images that go through the backbone together.
    gradient : {"exact", "one-pass"}
        What to do about the others, if there are any.
    graphs : int
        Images whose graphs are kept while the others are looked at, for "exact". At least those of one
        micro-batch are.
    """

    micro_batch: int
    gradient: Gradient
    graphs: int


@dataclass(frozen=True)
class Sight:
    """What a step has seen.

    Attributes
    ----------
    loss : float
        Of the images as they were, through the views of this step.
    features : Tensor, shape (C * K * A, D)
        Of all images.
    """

    loss: float
    features: Tensor


def pull(
    batch: Batch, backbone: Backbone, objective: Objective, cut: Cut, seen: Tensor | None, take: Take
) -> Sight:
    """Look at all images, and give away the gradient of their loss, micro-batch by micro-batch.

    Parameters
    ----------
    batch : Batch
    backbone : Backbone
    objective : callable
    cut : Cut
    seen : Tensor, shape (C * K * A, D), or None
        Features of the step before, for "one-pass"; where there are none, the gradient is exact.
    take : callable
        Is given every image of this process once. It may change the images that it is given.

    Raises
    ------
    NotFinite
        With an exact gradient, before any image is given away.
    """
    if cut.gradient == "one-pass" and seen is not None and cut.micro_batch < batch.images:
        return pull_in_one_pass(batch, backbone, objective, cut.micro_batch, seen, take)
    return pull_exactly(batch, backbone, objective, cut, take)


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


def pull_exactly(batch: Batch, backbone: Backbone, objective: Objective, cut: Cut, take: Take) -> Sight:
    """Give away the gradient of the whole batch."""
    graphs: list[tuple[list[Tensor], Tensor]] = []
    features = []
    cuts = list(parts(batch.images, cut.micro_batch))
    for part in cuts:
        kept = part is cuts[-1] or batch.images - part.start <= cut.graphs
        with torch.set_grad_enabled(kept):
            leaves = leaves_of(batch, part)
            found = features_of(batch, backbone, leaves, part)
        features.append(found.detach())
        if kept:
            graphs.append((leaves, found))
    seen = torch.cat(features)
    features.clear()
    loss, towards, known = pulled(batch, objective, seen)
    each = batch.shape[2]
    for part in reversed(cuts):
        if graphs:
            leaves, found = graphs.pop()
        else:
            leaves = leaves_of(batch, part)
            found = features_of(batch, backbone, leaves, part)
        take(part, gradient_of(found, leaves, towards[part.start * each : part.stop * each]))
    return Sight(loss, known)


def pulled(batch: Batch, objective: Objective, features: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the loss, how it pulls at this process's features, and the features of all images.

    Parameters
    ----------
    batch : Batch
    objective : callable
    features : Tensor, shape (N * A, D)
        Of this process's images; without a graph.

    Returns
    -------
    loss : float
    towards : Tensor, shape (N * A, D)
        Gradient of the loss.
    known : Tensor, shape (C * K * A, D)

    Raises
    ------
    NotFinite
    """
    known = batch.everyones(features).requires_grad_()
    loss = objective(known.view(*batch.shape, -1))
    (towards,) = torch.autograd.grad(loss, known)
    return finite(loss), towards[batch.own], known.detach()


def pull_in_one_pass(
    batch: Batch, backbone: Backbone, objective: Objective, micro_batch: int, seen: Tensor, take: Take
) -> Sight:
    """Give away the gradient of each micro-batch among the features last seen of all others.

    Raises
    ------
    NotFinite
        For a micro-batch; those before it have been given away then.
    """
    features = seen.clone()
    each, first = batch.shape[2], batch.own.start
    for part in parts(batch.images, micro_batch):
        leaves = leaves_of(batch, part)
        fresh = features_of(batch, backbone, leaves, part)
        begin, end = first + part.start * each, first + part.stop * each
        among = torch.cat([features[:begin], fresh, features[end:]])
        loss = objective(among.view(*batch.shape, -1))
        finite(loss)
        features[begin:end] = fresh.detach()
        take(part, gradient_of(loss, leaves))
    known = batch.everyones(features[batch.own])
    return Sight(finite(objective(known.view(*batch.shape, -1))), known)


def finite(loss: Tensor) -> float:
    """Return a loss as a number.

    Raises
    ------
    NotFinite
    """
    value = loss.item()
    if not math.isfinite(value):
        raise NotFinite(value)
    return value


def gradient_of(value: Tensor, leaves: Sequence[Tensor], towards: Tensor | None = None) -> list[Tensor]:
    """Return the gradient with respect to each level, laid out as the levels are.

    torch's fused Adam reads gradients in the order of memory.
    """
    return [each.contiguous() for each in torch.autograd.grad(value, leaves, towards)]


def parts(images: int, micro_batch: int) -> Iterator[slice]:
    """Cut images into micro-batches."""
    return (slice(start, min(start + micro_batch, images)) for start in range(0, images, micro_batch))


def leaves_of(batch: Batch, part: slice) -> list[Tensor]:
    """Return the pyramids of some images as leaves: a gradient with respect to them is of their size."""
    return [level.detach()[part].requires_grad_() for level in batch.levels]
