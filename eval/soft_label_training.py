"""Train fresh linear heads on soft labels of images, otherwise as the linear probe."""

import torch
from torch import Tensor

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.linear_probe import HeadGradients, train_fresh_heads
from sfm.eval.training import BatchSchedule, CountCallback, ignore_progress_count


def compute_soft_target_gradients(heads: LinearHeads, features: Tensor, soft_labels: Tensor) -> HeadGradients:
    """Return the gradient of each seed's mean cross-entropy ``-sum(Q log P)`` with soft labels ``Q``.

    With ``P`` the softmax of the logits: ``dW = (P - Q)^T X / B`` and ``db = sum(P - Q) / B``. It is also
    that of the Kullback-Leibler divergence ``KL(Q || P)``, which differs by a constant.

    Parameters
    ----------
    heads : LinearHeads
    features : Tensor, shape (seed, batch, feature)
    soft_labels : Tensor, shape (seed, batch, class)
        Every row sums to one.
    """
    logits = torch.baddbmm(heads.bias[:, None], features, heads.weight.transpose(1, 2))
    error = (logits.softmax(-1) - soft_labels) / features.shape[1]
    return HeadGradients(error.transpose(1, 2) @ features, error.sum(1))


def train_heads_on_soft_labels(
    view_features: Tensor,
    soft_labels: Tensor,
    schedule: BatchSchedule,
    initial_weights: Tensor,
    on_epoch: CountCallback = ignore_progress_count,
) -> LinearHeads:
    """Train one linear head per seed on one soft label per image, by the schedule of the linear probe.

    Parameters
    ----------
    view_features : Tensor, shape (image, view, feature)
    soft_labels : Tensor, shape (image, class)
        On the device of `view_features`.
    schedule : BatchSchedule
    initial_weights : Tensor, shape (seed, class, feature)
        Initial weights; biases start at zero.
    on_epoch : callable, optional

    Returns
    -------
    LinearHeads
    """

    def compute_gradients(heads: LinearHeads, image_indices: Tensor, view_indices: Tensor) -> HeadGradients:
        return compute_soft_target_gradients(
            heads, view_features[image_indices, view_indices], soft_labels[image_indices]
        )

    return train_fresh_heads(compute_gradients, schedule, initial_weights.to(view_features), on_epoch)
