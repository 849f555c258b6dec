"""One training step: decode the pyramids, augment, compute features, loss and gradients, update with Adam.

The loss depends on the images through their features only, C * K * A vectors that always fit in memory. So
images are processed in micro-batches, however many classes there are, in one of two ways:

exact
    Forward for all features; the loss and its gradient with respect to them; then backward of each
    micro-batch, the last one first. The graphs of the last images are kept in between; the others, of which
    only the features are kept, go forward once more, with the same augmentation. The result is the
    gradient of the whole batch.
one-pass
    Forward and backward once per micro-batch; the features of all other images are the last computed ones,
    from this step or the one before. The gradient is stale by less than a step.

The same holds for images of other processes: once per step, all processes gather all features.

A gradient is as large as the pyramids. So each micro-batch's gradient goes to a callback, and the whole
gradient is never in memory.

The images may be matched to several backbones: the loss is the weighted mean of theirs. The backbones take
turns, so that activations of one are in memory at a time. The gradients of all but the last are added up in a
buffer, which is as large as the pyramids.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.distill.adam import AdamState, adam_step, init_adam
from sfm.distill.augment import (
    AugmentationParameters,
    augment,
    draw_augmentation,
    make_whole_image_views,
)
from sfm.distill.feature_average import make_objective_at_feature_average, update_feature_average
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.pyramid import (
    append_level_of_zeros_or_image_and_rescale,
    append_noise_level_and_rescale,
    decode_pyramid,
)
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.errors import InputError

GradientMethod = Literal["exact", "one-pass"]

Objective = Callable[[Tensor], Tensor]
"""From features of shape (C, K, A, D) to a loss of shape ()."""

LossAndAllFeatures = tuple[float, Tensor]
"""Loss of all images before the update, and their features, shape (C * K * A, D)."""

GradientCallback = Callable[[slice, list[Tensor]], None]
"""Takes a slice of the batch's images, and the gradient with respect to each of their levels."""


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite, so there is no gradient."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss


@dataclass(frozen=True)
class LossTerm:
    """One backbone's term of the loss.

    Attributes
    ----------
    backbone : Backbone
    objective : callable
        From the backbone's features to a loss.
    weight : float
        Of the loss, in the weighted mean over all backbones.
    """

    backbone: Backbone
    objective: Objective
    weight: float = 1.0


@dataclass(frozen=True)
class FeatureState:
    """What a step keeps of a backbone's features for the next one, unless the pyramid grows in between.

    Attributes
    ----------
    last : Tensor, shape (C * K * A, D), or None
        Features of all images in the last step, where the next one needs them: with several micro-batches in
        one pass.
    average : Tensor, shape (C * K, D), or None
        Moving average over the steps since the pyramid grew, where the gradient is taken there.
    """

    last: Tensor | None = None
    average: Tensor | None = None


@dataclass
class DistillState:
    """State that a training step updates.

    Attributes
    ----------
    step : int
        Steps done.
    levels : list of Tensor, shapes (N, 3, r, r)
        The pyramids of this process's images: those of the first class first. One process has all of them.
    adam : AdamState
        Optimizer state.
    features : list of FeatureState
        One per backbone; empty before the first step, and when the pyramid has grown.
    """

    step: int
    levels: list[Tensor]
    adam: AdamState
    features: list[FeatureState] = field(default_factory=list)


@dataclass(frozen=True)
class StepOutput:
    """The result of one step.

    Attributes
    ----------
    step : int
        Number of the step, from 1.
    loss : float
        Loss of all images before the step.
    learning_rate : float
    resolution : int
        Side of the finest level, in pixels.
    """

    step: int
    loss: float
    learning_rate: float
    resolution: int


@dataclass(frozen=True)
class ImageBatch:
    """The images of a step that this process has, with their augmentation.

    Attributes
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        The pyramids: images of the first class first. One process has all of them, N = C * K.
    canvas_pixels, view_pixels : int
        Sides of the images and of their views, in pixels.
    augmentation : AugmentationParameters
        Of N * A views: those of the first image first.
    class_image_view_counts : tuple of int
        C, K and A, of all images.
    group : ProcessGroup
        The processes that share them.
    color_decorrelation : bool
        See :func:`decode_pyramid`.
    """

    levels: Sequence[Tensor]
    canvas_pixels: int
    view_pixels: int
    augmentation: AugmentationParameters
    class_image_view_counts: tuple[int, int, int]
    group: ProcessGroup = SINGLE_PROCESS
    color_decorrelation: bool = True

    @property
    def image_count(self) -> int:
        """Number of this process's images, N."""
        return len(self.levels[0])

    @property
    def own_feature_rows(self) -> slice:
        """Rows of this process's features among those of all images."""
        classes, ipc, views = self.class_image_view_counts
        return self.group.get_own_row_slice(classes, ipc * views)

    def get_view_slice(self, image_slice: slice) -> slice:
        """Return the rows of this process's views that belong to some of its images."""
        views = self.class_image_view_counts[2]
        return slice(image_slice.start * views, image_slice.stop * views)

    def all_gather_features(self, features: Tensor) -> Tensor:
        """Return the features of all images, shape (C * K * A, D), from each process's own."""
        classes, ipc, views = self.class_image_view_counts
        return self.group.all_gather(features, self.own_feature_rows, classes * ipc * views)


@dataclass(frozen=True)
class MicroBatching:
    """How the images of a process are split into micro-batches.

    Attributes
    ----------
    micro_batch_size : int
        Images that go through the backbone together.
    gradient_method : {"exact", "one-pass"}
        How gradients are computed from several micro-batches.
    kept_graph_image_count : int
        Images whose graphs are kept while the others go forward, for "exact". At least those of one
        micro-batch are.
    """

    micro_batch_size: int
    gradient_method: GradientMethod
    kept_graph_image_count: int


def init_distill_state(
    config: ResolvedDistillConfig, device: torch.device, group: ProcessGroup = SINGLE_PROCESS
) -> DistillState:
    """Return the state before the first step: one level of N(0, 1), unless the config says otherwise."""
    levels: list[Tensor] = []
    for _ in range(config.count_levels_at(0)):
        levels = add_pyramid_level(levels, config, device, group)
    return DistillState(0, levels, init_adam(levels))


def add_pyramid_level(
    levels: list[Tensor],
    config: ResolvedDistillConfig,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[Tensor]:
    """Return the levels with the next finer one added."""
    resolution = config.level_resolutions[len(levels)]
    rows = group.get_own_row_slice(len(config.classes), config.ipc)
    if config.start == "zeros":
        return append_level_of_zeros_or_image_and_rescale(levels, resolution, rows.stop - rows.start, device)
    return append_noise_level_and_rescale(levels, resolution, config.image_count, config.seed, device, rows)


def draw_step_augmentation(
    config: ResolvedDistillConfig, step: int, total_view_count: int
) -> AugmentationParameters:
    """Draw the augmentation of a step as the config says: random, or views of whole images.

    Parameters
    ----------
    config : ResolvedDistillConfig
    step : int
        Number of the step in the run.
    total_view_count : int
        Number of views of all images, in all processes.
    """
    if not config.augmentation:
        return make_whole_image_views(total_view_count, config.canvas_pixels)
    return draw_augmentation(
        config.seed, step, total_view_count, config.canvas_pixels, config.crop_edge, config.noisy_views
    )


def train_step(
    state: DistillState,
    config: ResolvedDistillConfig,
    terms: Sequence[LossTerm],
    group: ProcessGroup = SINGLE_PROCESS,
) -> StepOutput:
    """Do one step in place: add a pyramid level if due, then update all images.

    Raises
    ------
    InputError
        If the loss is not finite (in all processes), or a process is lost. With an exact gradient the state
        is unchanged then.
    """
    if config.count_levels_at(state.step) > len(state.levels):
        state.levels = add_pyramid_level(state.levels, config, terms[0].backbone.device, group)
        state.adam, state.features = init_adam(state.levels), []

    classes, ipc, views = shape = (len(config.classes), config.ipc, config.views)
    augmentation = draw_step_augmentation(config, state.step, classes * ipc * views)
    augmentation = augmentation.select_views(group.get_own_row_slice(classes, ipc * views))
    batch = ImageBatch(
        state.levels,
        config.canvas_pixels,
        config.image_size,
        augmentation,
        shape,
        group,
        config.color_decorrelation,
    )
    learning_rate = config.learning_rate_at(state.step)

    def update_images(images: slice, gradients: list[Tensor]) -> None:
        adam_step(state.levels, state.adam, learning_rate, images, gradients)

    try:
        loss, state.features = compute_joint_gradients(batch, config, terms, state, update_images)
    except NonFiniteLossError as error:
        raise InputError(
            f"the loss is {error.loss} in step {state.step + 1}: "
            f"lower the learning rate ({config.learning_rate:g})"
        ) from error
    state.adam.step_count += 1
    state.step += 1
    return StepOutput(state.step, loss, learning_rate, state.levels[-1].shape[-1])


def compute_joint_gradients(
    batch: ImageBatch,
    config: ResolvedDistillConfig,
    terms: Sequence[LossTerm],
    state: DistillState,
    on_gradient: GradientCallback,
) -> tuple[float, list[FeatureState]]:
    """Compute the weighted mean of the backbones' losses, and pass its gradient to `on_gradient`.

    Parameters
    ----------
    batch : ImageBatch
        Each backbone gets its views, at the size of its own input.
    config : ResolvedDistillConfig
    terms : sequence of LossTerm
    state : DistillState
        Not changed here.
    on_gradient : callable
        Called once for every image of this process, while the last backbone's gradients are computed.

    Returns
    -------
    loss : float
        Loss of the images before the update.
    features : list of FeatureState
        What the next step needs of this one.

    Raises
    ------
    NonFiniteLossError
        See :func:`compute_gradients`.
    """
    batching = MicroBatching(config.micro_batch, config.gradient, config.graphs)
    total_weight = math.fsum(term.weight for term in terms)
    states_before = state.features or [FeatureState()] * len(terms)
    joint_loss, feature_states = 0.0, []
    callbacks = make_gradient_summing_callbacks(len(terms), batch.levels, on_gradient)
    for term, before, callback in zip(terms, states_before, callbacks, strict=True):
        objective = scale_objective(term.objective, term.weight / total_weight)
        if config.feature_decay:
            count = state.adam.step_count + 1
            objective = make_objective_at_feature_average(
                objective, before.average, config.feature_decay, count
            )
        own_batch = replace(batch, view_pixels=term.backbone.card.preprocessing.input_size)
        loss, features = compute_gradients(
            own_batch, term.backbone, objective, batching, before.last, callback
        )
        joint_loss += loss
        feature_states.append(make_feature_state(before, features, own_batch, config))
    return joint_loss, feature_states


def scale_objective(objective: Objective, factor: float) -> Objective:
    """Return an objective times a factor; with a factor of 1, itself."""
    return objective if factor == 1 else lambda features: factor * objective(features)


def make_gradient_summing_callbacks(
    term_count: int, levels: Sequence[Tensor], on_gradient: GradientCallback
) -> list[GradientCallback]:
    """Return a callback per term: they add gradients up, and the last one passes the sum on.

    One term needs no sum. That of several takes as much memory as the levels.
    """
    if term_count == 1:
        return [on_gradient]
    sums = [torch.zeros_like(level, requires_grad=False) for level in levels]

    def add_to_sum(images: slice, gradients: list[Tensor]) -> None:
        for total, gradient in zip(sums, gradients, strict=True):
            total[images] += gradient

    def add_and_pass_on(images: slice, gradients: list[Tensor]) -> None:
        add_to_sum(images, gradients)
        on_gradient(images, [total[images] for total in sums])

    return [*[add_to_sum] * (term_count - 1), add_and_pass_on]


def make_feature_state(
    previous: FeatureState, features: Tensor, batch: ImageBatch, config: ResolvedDistillConfig
) -> FeatureState:
    """Return what the next step needs of the features of this one, shape (C * K * A, D)."""
    classes, ipc, views = batch.class_image_view_counts
    is_split = config.micro_batch < batch.group.count_rows_per_process(classes, ipc)[0]
    average = None
    if config.feature_decay:
        shaped = features.view(classes, ipc, views, -1)
        average = update_feature_average(previous.average, shaped, config.feature_decay)
    return FeatureState(features if config.gradient == "one-pass" and is_split else None, average)


def compute_features(
    batch: ImageBatch, backbone: Backbone, sliced_levels: Sequence[Tensor], image_slice: slice
) -> Tensor:
    """Decode and augment some images, and compute the features of their views.

    Parameters
    ----------
    batch : ImageBatch
    backbone : Backbone
    sliced_levels : sequence of Tensor
        The pyramids of these images only; differentiable.
    image_slice : slice
        Which images of the batch they are.

    Returns
    -------
    Tensor, shape (images * A, D)
    """
    augmentation = batch.augmentation.select_views(batch.get_view_slice(image_slice))
    images = decode_pyramid(sliced_levels, batch.canvas_pixels, batch.color_decorrelation)
    return backbone.features(augment(images, augmentation, batch.view_pixels))


def compute_gradients(
    batch: ImageBatch,
    backbone: Backbone,
    objective: Objective,
    batching: MicroBatching,
    last_features: Tensor | None,
    on_gradient: GradientCallback,
) -> LossAndAllFeatures:
    """Compute the loss, and pass each micro-batch's gradient to `on_gradient`.

    Parameters
    ----------
    batch : ImageBatch
    backbone : Backbone
    objective : callable
    batching : MicroBatching
    last_features : Tensor, shape (C * K * A, D), or None
        Features of the step before, for "one-pass"; without them the gradient is exact.
    on_gradient : callable
        Called once for every image of this process. It may change the images that it is called for.

    Returns
    -------
    loss : float
        Loss of the images before the update.
    all_features : Tensor, shape (C * K * A, D)
        Features of all images.

    Raises
    ------
    NonFiniteLossError
        With an exact gradient, before `on_gradient` is called.
    """
    if (
        batching.gradient_method == "one-pass"
        and last_features is not None
        and batching.micro_batch_size < batch.image_count
    ):
        return compute_stale_gradients(
            batch, backbone, objective, batching.micro_batch_size, last_features, on_gradient
        )
    return compute_exact_gradients(batch, backbone, objective, batching, on_gradient)


def compute_exact_gradients(
    batch: ImageBatch,
    backbone: Backbone,
    objective: Objective,
    batching: MicroBatching,
    on_gradient: GradientCallback,
) -> LossAndAllFeatures:
    """Pass the gradient of the whole batch to `on_gradient`; see :func:`compute_gradients`."""
    graphs: list[tuple[list[Tensor], Tensor]] = []
    own_features = []
    micro_batches = list(split_into_micro_batches(batch.image_count, batching.micro_batch_size))
    for images in micro_batches:
        keep_graph = (
            images is micro_batches[-1] or batch.image_count - images.start <= batching.kept_graph_image_count
        )
        with torch.set_grad_enabled(keep_graph):
            levels = detach_as_leaf_levels(batch, images)
            features = compute_features(batch, backbone, levels, images)
        own_features.append(features.detach())
        if keep_graph:
            graphs.append((levels, features))
    all_features = batch.all_gather_features(torch.cat(own_features)).requires_grad_()
    own_features.clear()
    loss = objective(all_features.view(*batch.class_image_view_counts, -1))
    (grad_features,) = torch.autograd.grad(loss, all_features)
    loss_value = require_finite_loss(loss)
    grad_features = grad_features[batch.own_feature_rows]
    for images in reversed(micro_batches):
        if graphs:
            levels, features = graphs.pop()
        else:
            levels = detach_as_leaf_levels(batch, images)
            features = compute_features(batch, backbone, levels, images)
        on_gradient(
            images, compute_level_gradients(features, levels, grad_features[batch.get_view_slice(images)])
        )
    return loss_value, all_features.detach()


def compute_stale_gradients(
    batch: ImageBatch,
    backbone: Backbone,
    objective: Objective,
    micro_batch_size: int,
    last_features: Tensor,
    on_gradient: GradientCallback,
) -> LossAndAllFeatures:
    """Pass gradients to `on_gradient` that use the last known features of all other images.

    Raises
    ------
    NonFiniteLossError
        For a micro-batch; `on_gradient` has been called for those before it then.
    """
    all_features = last_features.clone()
    offset = batch.own_feature_rows.start
    for images in split_into_micro_batches(batch.image_count, micro_batch_size):
        levels = detach_as_leaf_levels(batch, images)
        features = compute_features(batch, backbone, levels, images)
        views = batch.get_view_slice(images)
        start, stop = offset + views.start, offset + views.stop
        mixed = torch.cat([all_features[:start], features, all_features[stop:]])
        loss = objective(mixed.view(*batch.class_image_view_counts, -1))
        require_finite_loss(loss)
        all_features[start:stop] = features.detach()
        on_gradient(images, compute_level_gradients(loss, levels))
    all_features = batch.all_gather_features(all_features[batch.own_feature_rows])
    return require_finite_loss(objective(all_features.view(*batch.class_image_view_counts, -1))), all_features


def require_finite_loss(loss: Tensor) -> float:
    """Return a loss as a number.

    Raises
    ------
    NonFiniteLossError
    """
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteLossError(value)
    return value


def compute_level_gradients(
    output: Tensor, levels: Sequence[Tensor], grad_output: Tensor | None = None
) -> list[Tensor]:
    """Return the gradient with respect to each level, contiguous as the levels are.

    torch's fused Adam reads gradients in the order of memory.
    """
    return [gradient.contiguous() for gradient in torch.autograd.grad(output, levels, grad_output)]


def split_into_micro_batches(image_count: int, micro_batch_size: int) -> Iterator[slice]:
    """Split images into micro-batches."""
    return (
        slice(start, min(start + micro_batch_size, image_count))
        for start in range(0, image_count, micro_batch_size)
    )


def detach_as_leaf_levels(batch: ImageBatch, image_slice: slice) -> list[Tensor]:
    """Return the pyramids of some images as leaf tensors, so that gradients have their size."""
    return [level.detach()[image_slice].requires_grad_() for level in batch.levels]
