"""Linear probe: a fresh linear head trained on the features of synthetic images (design, section 6)."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval.accuracy import Heads
from sfm.eval.training import Group, Plan, Told, at_most_threads, descend, nobody_told

RATE = 1e-3
DEVIATION = 0.01
# Up to this many weights, a step is too short to be shared between threads.
WEIGHTS_OF_ONE_THREAD = 2**17


def head_gradients(heads: Heads, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the mean cross-entropy of each seed's head.

    With ``P`` the softmax of the logits and ``Y`` the one-hot labels: ``dW = (P - Y)^T X / B`` and
    ``db = sum(P - Y) / B``.

    Parameters
    ----------
    heads : Heads
    features : Tensor, shape (seed, batch, feature)
    labels : Tensor of int64, shape (seed, batch)

    Returns
    -------
    tuple of Tensor
        Shapes (seed, class, feature) and (seed, class).
    """
    logits = torch.baddbmm(heads.bias[:, None], features, heads.weight.transpose(1, 2))
    error = (logits.softmax(-1) - one_hot(labels, logits.shape[-1])) / labels.shape[1]
    return error.transpose(1, 2) @ features, error.sum(1)


def threads_for(weights: int) -> int:
    """Return how many threads a training step of so many weights is worth."""
    return 1 if weights <= WEIGHTS_OF_ONE_THREAD else torch.get_num_threads()


def train_heads(
    pool: Tensor,
    labels: Tensor,
    plan: Plan,
    start: Tensor,
    on_epoch: Told = nobody_told,
) -> Heads:
    """Train one linear head per seed, all at once.

    Adam at 1e-3 * B / 256, cosine to zero, no weight decay; the head after the last epoch is returned.

    Parameters
    ----------
    pool : Tensor, shape (image, view, feature)
        Features of the views of every image.
    labels : Tensor of int64, shape (image,)
        On the device of `pool`.
    plan : Plan
        Which image and which view each seed sees when.
    start : Tensor, shape (seed, class, feature)
        Initial weights; biases start at zero.
    on_epoch : callable, optional
        Told the epochs done and how many there are.

    Returns
    -------
    Heads
    """
    heads = Heads(start.to(pool, copy=True), pool.new_zeros(start.shape[:2]))
    with at_most_threads(threads_for(start.numel())):
        descend(
            [Group([heads.weight, heads.bias], RATE)],
            lambda rows, looks: head_gradients(heads, pool[rows, looks], labels[rows]),
            plan,
            on_epoch,
        )
    return heads
