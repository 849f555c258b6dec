"""Linear probe: train a fresh linear head on the features of synthetic images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval.head_accuracy import LinearHeads
from sfm.eval.training import (
    BatchSchedule,
    CountCallback,
    ParamGroup,
    ignore_progress_count,
    limit_torch_threads,
    train_with_adam,
)


class HeadGradients(NamedTuple):
    """Gradients of each seed's loss.

    Attributes
    ----------
    weight : Tensor, shape (seed, class, feature)
    bias : Tensor, shape (seed, class)
    """

    weight: Tensor
    bias: Tensor


HeadGradientFunction = Callable[[LinearHeads, Tensor, Tensor], HeadGradients]
"""Takes the heads and the indices of a batch's images and views."""

HEAD_LEARNING_RATE = 1e-3
INITIAL_STD = 0.01
# Up to this many weights, a step is too short to be shared between threads.
MAX_SINGLE_THREAD_WEIGHTS = 2**17


def compute_head_gradients(heads: LinearHeads, features: Tensor, labels: Tensor) -> HeadGradients:
    """Return the gradient of the mean cross-entropy of each seed's head.

    With ``P`` the softmax of the logits and ``Y`` the one-hot labels: ``dW = (P - Y)^T X / B`` and
    ``db = sum(P - Y) / B``.

    Parameters
    ----------
    heads : LinearHeads
    features : Tensor, shape (seed, batch, feature)
    labels : Tensor of int64, shape (seed, batch)
    """
    logits = torch.baddbmm(heads.bias[:, None], features, heads.weight.transpose(1, 2))
    error = (logits.softmax(-1) - one_hot(labels, logits.shape[-1])) / labels.shape[1]
    return HeadGradients(error.transpose(1, 2) @ features, error.sum(1))


def choose_thread_count(weight_count: int) -> int:
    """Return the number of threads for a training step with this number of weights."""
    return 1 if weight_count <= MAX_SINGLE_THREAD_WEIGHTS else torch.get_num_threads()


def train_fresh_heads(
    compute_gradients: HeadGradientFunction,
    schedule: BatchSchedule,
    initial_weights: Tensor,
    on_epoch: CountCallback,
) -> LinearHeads:
    """Train one linear head per seed, all at once, on any loss.

    Adam at 1e-3 * B / 256, cosine to zero, no weight decay; the head after the last epoch is returned.

    Parameters
    ----------
    compute_gradients : callable
        Of each seed's loss.
    schedule : BatchSchedule
    initial_weights : Tensor, shape (seed, class, feature)
        Initial weights, of the dtype and on the device to train with; biases start at zero.
    on_epoch : callable
        Called with the epochs done and their total.
    """
    heads = LinearHeads(initial_weights.clone(), initial_weights.new_zeros(initial_weights.shape[:2]))
    with limit_torch_threads(choose_thread_count(initial_weights.numel())):
        train_with_adam(
            [ParamGroup([heads.weight, heads.bias], HEAD_LEARNING_RATE)],
            lambda image_indices, view_indices: compute_gradients(heads, image_indices, view_indices),
            schedule,
            on_epoch,
        )
    return heads


def train_linear_heads(
    view_features: Tensor,
    labels: Tensor,
    schedule: BatchSchedule,
    initial_weights: Tensor,
    on_epoch: CountCallback = ignore_progress_count,
) -> LinearHeads:
    """Train one linear head per seed on hard labels, see :func:`train_fresh_heads`.

    Parameters
    ----------
    view_features : Tensor, shape (image, view, feature)
        Features of the views of every image.
    labels : Tensor of int64, shape (image,)
        On the device of `view_features`.
    schedule : BatchSchedule
    initial_weights : Tensor, shape (seed, class, feature)
        Initial weights; biases start at zero.
    on_epoch : callable, optional
        Called with the epochs done and their total.

    Returns
    -------
    LinearHeads
    """

    def compute_gradients(heads: LinearHeads, image_indices: Tensor, view_indices: Tensor) -> HeadGradients:
        return compute_head_gradients(
            heads, view_features[image_indices, view_indices], labels[image_indices]
        )

    return train_fresh_heads(compute_gradients, schedule, initial_weights.to(view_features), on_epoch)
