"""Knowledge distillation: a head on the evaluation backbone that learns from the inherited classifier."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval.accuracy import Heads
from sfm.eval.probe import RATE, threads_for
from sfm.eval.training import Group, Plan, Told, at_most_threads, descend, nobody_told

TEMPERATURE = 4.0
SOFT_WEIGHT = 0.5


def soft_labels(targets: Tensor, classifier: Heads) -> Tensor:
    """Return what the inherited classifier says of every view, softened: ``softmax(logits / T)``.

    Parameters
    ----------
    targets : Tensor, shape (image, view, target feature)
        Features of the distillation backbone.
    classifier : Heads
        One, of that feature space.

    Returns
    -------
    Tensor, shape (image, view, class)
    """
    logits = targets @ classifier.weight[0].T + classifier.bias[0]
    return (logits / TEMPERATURE).softmax(-1)


def distilled_gradients(
    heads: Heads, features: Tensor, labels: Tensor, soft: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of each seed's mean of ``w T^2 KL(soft || P_T) + (1 - w) CE(labels, P)``.

    With ``P`` and ``P_T`` the softmax of the logits and of the logits over T, the gradient with respect to
    the logits is ``w T (P_T - soft) + (1 - w) (P - Y)``. The factor T^2 keeps the two parts in proportion
    whatever the temperature (Hinton, Vinyals, Dean 2015).

    Parameters
    ----------
    heads : Heads
    features : Tensor, shape (seed, batch, feature)
    labels : Tensor of int64, shape (seed, batch)
    soft : Tensor, shape (seed, batch, class)

    Returns
    -------
    tuple of Tensor
        Shapes (seed, class, feature) and (seed, class).
    """
    logits = torch.baddbmm(heads.bias[:, None], features, heads.weight.transpose(1, 2))
    softened = (logits / TEMPERATURE).softmax(-1) - soft
    error = logits.softmax(-1) - one_hot(labels, logits.shape[-1])
    error = (SOFT_WEIGHT * TEMPERATURE * softened + (1 - SOFT_WEIGHT) * error) / labels.shape[1]
    return error.transpose(1, 2) @ features, error.sum(1)


def train_from_teacher(
    pool: Tensor,
    labels: Tensor,
    soft: Tensor,
    plan: Plan,
    start: Tensor,
    on_epoch: Told = nobody_told,
) -> Heads:
    """Train one linear head per seed from hard and soft labels, by the schedule of the linear probe.

    Parameters
    ----------
    pool : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    labels : Tensor of int64, shape (image,)
    soft : Tensor, shape (image, view, class)
        As :func:`soft_labels` gives them, of the same views.
    plan : Plan
    start : Tensor, shape (seed, class, feature)
        Initial weights; biases start at zero.
    on_epoch : callable, optional

    Returns
    -------
    Heads
    """
    heads = Heads(start.to(pool, copy=True), pool.new_zeros(start.shape[:2]))
    with at_most_threads(threads_for(start.numel())):
        descend(
            [Group([heads.weight, heads.bias], RATE)],
            lambda rows, looks: distilled_gradients(
                heads, pool[rows, looks], labels[rows], soft[rows, looks]
            ),
            plan,
            on_epoch,
        )
    return heads
