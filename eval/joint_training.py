"""Heads behind projectors, trained on the labels: the published joint (JT) and stage-wise (ST) training.

Compared with classifier inheritance they show the effect of not fixing the inherited classifier. Joint
training also trains the projector on the labels, not on the other backbone's features.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval import linear_probe
from sfm.eval.head_accuracy import LinearHeads, SingleLinearHead
from sfm.eval.projectors import LinearProjectors, copy_contiguous
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
    initial_projectors: LinearProjectors,
    schedule: BatchSchedule,
    on_epoch: CountCallback = ignore_progress_count,
) -> ProjectedHeads:
    """Train projectors and heads together on cross-entropy, both by Adam at 1e-3 * B / 256: published JT.

    Parameters
    ----------
    view_features : Tensor, shape (image, view, feature)
    labels : Tensor of int64, shape (image,)
    inherited_classifier : SingleLinearHead
        Of the distillation backbone's feature space; the heads start as copies of it.
    initial_projectors : LinearProjectors
        One per seed; published is the start of ``torch.nn.Linear``, see
        :func:`~sfm.eval.projectors.init_projectors`. Not changed.
    schedule : BatchSchedule
    on_epoch : callable, optional
        Called with the epochs done and their total.

    Returns
    -------
    ProjectedHeads
    """
    model = ProjectedHeads(
        LinearProjectors(
            copy_contiguous(initial_projectors.weight, view_features),
            copy_contiguous(initial_projectors.bias, view_features),
        ),
        copy_classifier_per_seed(inherited_classifier, schedule.seed_count, view_features),
    )
    parameters = [model.projectors.weight, model.projectors.bias, model.heads.weight, model.heads.bias]
    train_with_adam(
        [ParamGroup(parameters, linear_probe.HEAD_LEARNING_RATE)],
        lambda image_indices, view_indices: compute_projector_and_head_gradients(
            model, view_features[image_indices, view_indices], labels[image_indices]
        ),
        schedule,
        on_epoch,
    )
    return model


def train_heads_behind_projectors(
    view_features: Tensor,
    labels: Tensor,
    inherited_classifier: SingleLinearHead,
    projectors: LinearProjectors,
    schedule: BatchSchedule,
    on_epoch: CountCallback = ignore_progress_count,
) -> LinearHeads:
    """Train heads behind fixed projectors on cross-entropy, by Adam at 1e-3 * B / 256: published ST.

    Parameters
    ----------
    view_features, labels, inherited_classifier, schedule, on_epoch
        As for :func:`train_projectors_with_heads`.
    projectors : LinearProjectors
        One per seed, as classifier inheritance trains them: see
        :func:`~sfm.eval.projectors.train_projectors`. Not changed.

    Returns
    -------
    LinearHeads
        Of the distillation backbone's feature space.
    """
    heads = copy_classifier_per_seed(inherited_classifier, schedule.seed_count, view_features)
    train_with_adam(
        [ParamGroup([heads.weight, heads.bias], linear_probe.HEAD_LEARNING_RATE)],
        lambda image_indices, view_indices: linear_probe.compute_head_gradients(
            heads,
            apply_projectors(projectors, view_features[image_indices, view_indices]),
            labels[image_indices],
        ),
        schedule,
        on_epoch,
    )
    return heads


def copy_classifier_per_seed(
    classifier: SingleLinearHead, seed_count: int, view_features: Tensor
) -> LinearHeads:
    """Return a copy of a classifier for every seed, on the device and of the dtype of features."""
    return LinearHeads(
        classifier.weight.to(view_features).repeat(seed_count, 1, 1),
        classifier.bias.to(view_features).repeat(seed_count, 1),
    )


def apply_projectors(projectors: LinearProjectors, features: Tensor) -> Tensor:
    """Map features (seed, batch, feature) to the target space: (seed, batch, target feature)."""
    return torch.baddbmm(projectors.bias[:, None], features, projectors.weight.transpose(1, 2))
