"""One step of the distillation: decode the pyramids, look at the images, compare flows, move the levels."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.distill.adam import Moments, descend, no_moments
from sfm.distill.augment import draw_views
from sfm.distill.gradient import Batch, Cut, Gradient, NotFinite, Objective, pull
from sfm.distill.group import ALONE, Group
from sfm.distill.pyramid import canvas_size, grow, resolutions
from sfm.errors import InputError


@dataclass(frozen=True)
class Plan:
    """What shapes a run, besides backbone and objective.

    Attributes
    ----------
    classes, ipc, views : int
        C, K and A: K images of each class, seen through A views in every step.
    image_size : int
        Side of the views, in pixels: the backbone's input.
    steps : int
        Of the whole run.
    learning_rate, final_rate : float
        Of Adam, and what it has fallen to at the end of the run, as a part of it.
    grow_every : int
        Steps between two levels of the pyramid.
    micro_batch : int
        Images whose activations are in memory at a time, in each process.
    gradient : {"exact", "one-pass"}
        What a step does about the others, if there are any: see :mod:`sfm.distill.gradient`.
    graphs : int
        Images whose graphs are kept while the others are looked at, in each process.
    """

    classes: int
    ipc: int
    views: int
    image_size: int
    steps: int
    learning_rate: float
    final_rate: float
    grow_every: int
    seed: int
    micro_batch: int
    gradient: Gradient
    graphs: int

    @property
    def images(self) -> int:
        """How many images there are, C * K."""
        return self.classes * self.ipc

    @property
    def canvas(self) -> int:
        """Side of the images, in pixels."""
        return canvas_size(self.image_size)

    def levels(self, step: int) -> int:
        """Return how many levels the pyramid has in a step (the first is step 0)."""
        return min(len(resolutions(self.canvas)), 1 + step // self.grow_every)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (the first is step 0).

        For half of the run it is what it is; over the other half it falls along half a cosine.
        """
        part = max(0.0, 2 * (step + 1) / self.steps - 1)
        fallen = self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * min(1.0, part))) / 2
        return self.learning_rate * fallen


def even_growth(steps: int, image_size: int) -> int:
    """Steps between two levels such that L levels share the first half of a run: ``steps / (2 L)``.

    The other half, and its own share, are left to the finest level: it has the most to learn, from nothing.
    """
    return max(1, steps // (2 * len(resolutions(canvas_size(image_size)))))


@dataclass
class State:
    """Where a run stands; everything else follows from its plan.

    Attributes
    ----------
    step : int
        Steps done.
    levels : list of Tensor, shapes (N, 3, r, r)
        The pyramids of this process's images: those of the first class first. One process has all of them.
    moments : Moments
        Of the optimizer.
    seen : Tensor, shape (C * K * A, D), or None
        Features of all images in the last step, where the next one needs them: with several micro-batches in
        one pass, and unless the pyramid has grown since.
    """

    step: int
    levels: list[Tensor]
    moments: Moments
    seen: Tensor | None = None


def begin(plan: Plan, device: torch.device, group: Group = ALONE) -> State:
    """Return the state before the first step: one level of N(0, 1)."""
    levels = grown([], plan, device, group)
    return State(0, levels, no_moments(levels))


def grown(levels: list[Tensor], plan: Plan, device: torch.device, group: Group = ALONE) -> list[Tensor]:
    """Return the levels with the next finer one added."""
    resolution = resolutions(plan.canvas)[len(levels)]
    return grow(levels, resolution, plan.images, plan.seed, device, group.share(plan.classes, plan.ipc))


def advance(
    state: State, plan: Plan, backbone: Backbone, objective: Objective, group: Group = ALONE
) -> float:
    """Do one step: `state` moves on by one.

    Returns
    -------
    float
        The loss of all images as they were before the step.

    Raises
    ------
    InputError
        If the loss is not finite, in all processes then, or if one of them is lost. With an exact gradient
        the state is then still the one before the step.
    """
    if plan.levels(state.step) > len(state.levels):
        state.levels = grown(state.levels, plan, backbone.device, group)
        state.moments, state.seen = no_moments(state.levels), None

    views = draw_views(plan.seed, state.step, plan.images * plan.views, plan.canvas)
    own = views.part(group.share(plan.classes, plan.ipc * plan.views))
    shape = (plan.classes, plan.ipc, plan.views)
    batch = Batch(state.levels, plan.canvas, plan.image_size, own, shape, group)
    cut = Cut(plan.micro_batch, plan.gradient, plan.graphs)
    move = partial(descend, state.levels, state.moments, plan.rate(state.step))
    try:
        sight = pull(batch, backbone, objective, cut, state.seen, move)
    except NotFinite as error:
        raise InputError(
            f"the loss is {error.loss} in step {state.step + 1}: "
            f"lower the learning rate ({plan.learning_rate:g})"
        ) from error
    state.moments.age += 1
    if plan.gradient == "one-pass" and plan.micro_batch < group.shares(plan.classes, plan.ipc)[0].stop:
        state.seen = sight.features
    state.step += 1
    return sight.loss
