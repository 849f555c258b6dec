"""Projector and head trained on cross-entropy, together or one after the other.

Both start as classifier inheritance does: the projector at zero, the head as the classifier in the store.
Compared with inheritance they show the effect of not fixing the inherited classifier, and of not training the
projector on the other backbone's features.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval import linear_probe, projectors
from sfm.eval.head_accuracy import LinearHeads, SingleLinearHead
from sfm.eval.projectors import LinearProjectors
from sfm.eval.training import BatchSchedule, CountCallback, ParamGroup, ignore_progress_count, train_with_adam


@dataclass(frozen=True)
class ProjectedHeads:
    """Projectors and the heads behind them, one pair per seed."""

    projectors: LinearProjectors
    heads: LinearHeads


class ProjectedHeadGradients(NamedTuple):
    """Gradients of each seed's loss, shaped as the tensors of :class:`ProjectedHeads`."""

    projector_weight: Tensor
    projector_bias: Tensor
    head_weight: Tensor
    head_bias: Tensor


def compute_projector_and_head_gradients(
    model: ProjectedHeads, features: Tensor, labels: Tensor
) -> ProjectedHeadGradients:
    """Return the gradient of each seed's mean cross-entropy.

    With ``Z = X W^T + b``, P the softmax of ``Z A^T + a``, Y the one-hot labels and ``E = (P - Y) / B``:
    ``dA = E^T Z``, ``da = sum E``, ``dW = (E A)^T X``, ``db = sum E A``.

    Parameters
    ----------
    model : ProjectedHeads
    features : Tensor, shape (seed, batch, feature)
    labels : Tensor of int64, shape (seed, batch)
    """
    projectors, heads = model.projectors, model.heads
    hidden = apply_projectors(projectors, features)
    logits = torch.baddbmm(heads.bias[:, None], hidden, heads.weight.transpose(1, 2))
    error = (logits.softmax(-1) - one_hot(labels, logits.shape[-1])) / labels.shape[1]
    grad_hidden = error @ heads.weight
    return ProjectedHeadGradients(
        grad_hidden.transpose(1, 2) @ features,
        grad_hidden.sum(1),
        error.transpose(1, 2) @ hidden,
        error.sum(1),
    )


def train_projectors_with_heads(
    view_features: Tensor,
    labels: Tensor,
    inherited_classifier: SingleLinearHead,
    schedule: BatchSchedule,
    on_epoch: CountCallback = ignore_progress_count,
) -> ProjectedHeads:
    """Train projector (Adam at 1e-2 * B / 256) and head (1e-3 * B / 256) together.

    Parameters
    ----------
    view_features : Tensor, shape (image, view, feature)
    labels : Tensor of int64, shape (image,)
    inherited_classifier : SingleLinearHead
        Of the distillation backbone's feature space; the heads start as copies of it.
    schedule : BatchSchedule
    on_epoch : callable, optional
        Called with the epochs done and their total.

    Returns
    -------
    ProjectedHeads
    """
    model = init_projected_heads(view_features, inherited_classifier, schedule.seed_count)
    train_with_adam(
        [make_projector_param_group(model), make_head_param_group(model)],
        lambda image_indices, view_indices: compute_projector_and_head_gradients(
            model, view_features[image_indices, view_indices], labels[image_indices]
        ),
        schedule,
        on_epoch,
    )
    return model


def train_projectors_then_heads(
    view_features: Tensor,
    labels: Tensor,
    inherited_classifier: SingleLinearHead,
    schedule: BatchSchedule,
    on_epoch: CountCallback = ignore_progress_count,
) -> ProjectedHeads:
    """Train the projector before the fixed inherited classifier, then the head behind the fixed projector.

    Each of the two has all epochs, a cosine schedule, and the learning rate of
    :func:`train_projectors_with_heads`.

    Parameters
    ----------
    view_features, labels, inherited_classifier, schedule
        As for :func:`train_projectors_with_heads`.
    on_epoch : callable, optional
        Called with the epochs done, of twice those of the schedule.

    Returns
    -------
    ProjectedHeads
    """
    model = init_projected_heads(view_features, inherited_classifier, schedule.seed_count)
    total = 2 * schedule.epoch_count
    train_with_adam(
        [make_projector_param_group(model)],
        lambda image_indices, view_indices: compute_projector_and_head_gradients(
            model, view_features[image_indices, view_indices], labels[image_indices]
        )[:2],
        schedule,
        lambda done, _: on_epoch(done, total),
    )
    train_with_adam(
        [make_head_param_group(model)],
        lambda image_indices, view_indices: linear_probe.compute_head_gradients(
            model.heads,
            apply_projectors(model.projectors, view_features[image_indices, view_indices]),
            labels[image_indices],
        ),
        schedule,
        lambda done, _: on_epoch(schedule.epoch_count + done, total),
    )
    return model


def init_projected_heads(
    view_features: Tensor, inherited_classifier: SingleLinearHead, seed_count: int
) -> ProjectedHeads:
    """Return a projector of zeros and a copy of the inherited classifier for every seed."""
    width, features = inherited_classifier.weight.shape[2], view_features.shape[2]
    return ProjectedHeads(
        LinearProjectors(
            view_features.new_zeros((seed_count, width, features)),
            view_features.new_zeros((seed_count, width)),
        ),
        LinearHeads(
            inherited_classifier.weight.to(view_features.dtype).repeat(seed_count, 1, 1),
            inherited_classifier.bias.to(view_features.dtype).repeat(seed_count, 1),
        ),
    )


def apply_projectors(projectors: LinearProjectors, features: Tensor) -> Tensor:
    """Map features (seed, batch, feature) to the target space: (seed, batch, target feature)."""
    return torch.baddbmm(projectors.bias[:, None], features, projectors.weight.transpose(1, 2))


def make_projector_param_group(model: ProjectedHeads) -> ParamGroup:
    """Return the projectors as one parameter group."""
    return ParamGroup([model.projectors.weight, model.projectors.bias], projectors.PROJECTOR_LEARNING_RATE)


def make_head_param_group(model: ProjectedHeads) -> ParamGroup:
    """Return the heads as one parameter group."""
    return ParamGroup([model.heads.weight, model.heads.bias], linear_probe.HEAD_LEARNING_RATE)
