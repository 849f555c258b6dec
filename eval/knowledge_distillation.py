"""Knowledge distillation: train heads on the evaluation backbone with the inherited classifier as teacher."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval.head_accuracy import LinearHeads, SingleLinearHead
from sfm.eval.linear_probe import HeadGradients, train_fresh_heads
from sfm.eval.training import BatchSchedule, CountCallback, ignore_progress_count


def compute_soft_labels(
    target_features: Tensor, inherited_classifier: SingleLinearHead, temperature: float
) -> Tensor:
    """Return the inherited classifier's soft labels of every view: ``softmax(logits / T)``.

    Parameters
    ----------
    target_features : Tensor, shape (image, view, target feature)
        Features of the distillation backbone.
    inherited_classifier : SingleLinearHead
        Of that feature space.
    temperature : float
        T.

    Returns
    -------
    Tensor, shape (image, view, class)
    """
    logits = target_features @ inherited_classifier.weight[0].T + inherited_classifier.bias[0]
    return (logits / temperature).softmax(-1)


def compute_knowledge_distillation_gradients(
    heads: LinearHeads,
    features: Tensor,
    labels: Tensor,
    soft_labels: Tensor,
    temperature: float,
    soft_label_weight: float,
) -> HeadGradients:
    """Return the gradient of each seed's mean of ``w T^2 KL(soft || P_T) + (1 - w) CE(labels, P)``.

    With ``P`` and ``P_T`` the softmax of the logits and of the logits over T, the gradient with respect to
    the logits is ``w T (P_T - soft) + (1 - w) (P - Y)``. The factor T^2 keeps the two parts in proportion
    at any temperature (Hinton, Vinyals, Dean 2015).

    Parameters
    ----------
    heads : LinearHeads
    features : Tensor, shape (seed, batch, feature)
    labels : Tensor of int64, shape (seed, batch)
    soft_labels : Tensor, shape (seed, batch, class)
    temperature, soft_label_weight : float
        T and w.
    """
    logits = torch.baddbmm(heads.bias[:, None], features, heads.weight.transpose(1, 2))
    soft_error = (logits / temperature).softmax(-1) - soft_labels
    error = logits.softmax(-1) - one_hot(labels, logits.shape[-1])
    error = (soft_label_weight * temperature * soft_error + (1 - soft_label_weight) * error) / labels.shape[1]
    return HeadGradients(error.transpose(1, 2) @ features, error.sum(1))


def train_heads_on_hard_and_soft_labels(
    view_features: Tensor,
    labels: Tensor,
    soft_labels: Tensor,
    schedule: BatchSchedule,
    initial_weights: Tensor,
    temperature: float,
    soft_label_weight: float,
    on_epoch: CountCallback = ignore_progress_count,
) -> LinearHeads:
    """Train one linear head per seed from hard and soft labels, by the schedule of the linear probe.

    Parameters
    ----------
    view_features : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    labels : Tensor of int64, shape (image,)
    soft_labels : Tensor, shape (image, view, class)
        From :func:`compute_soft_labels`, of the same views.
    schedule : BatchSchedule
    initial_weights : Tensor, shape (seed, class, feature)
        Initial weights; biases start at zero.
    temperature, soft_label_weight : float
        See :func:`compute_knowledge_distillation_gradients`; the temperature is that of the soft labels.
    on_epoch : callable, optional

    Returns
    -------
    LinearHeads
    """

    def compute_gradients(heads: LinearHeads, image_indices: Tensor, view_indices: Tensor) -> HeadGradients:
        return compute_knowledge_distillation_gradients(
            heads,
            view_features[image_indices, view_indices],
            labels[image_indices],
            soft_labels[image_indices, view_indices],
            temperature,
            soft_label_weight,
        )

    return train_fresh_heads(compute_gradients, schedule, initial_weights.to(view_features), on_epoch)
