"""Top-1 and top-5 accuracy of linear heads on held-out features."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfm.stats_store.classifier_accuracy import TOP_K

MAX_BATCH_SAMPLES = 4096


@dataclass(frozen=True)
class LinearHeads:
    """Linear heads of one feature space, one per seed: ``logits = features @ weight.T + bias``.

    Attributes
    ----------
    weight : Tensor, shape (seed, class, feature)
    bias : Tensor, shape (seed, class)
    """

    weight: Tensor
    bias: Tensor


SingleLinearHead = LinearHeads
"""One head alone: the first axis has length 1."""


@dataclass(frozen=True)
class AccuracyBySeed:
    """Fractions of samples that are classified correctly, one per seed.

    Attributes
    ----------
    top1 : list of float
    top5 : list of float or None
        None with fewer than five classes: the true class is then always among the first five.
    mean_top1_by_class : list of (float or None)
        Top-1 by class, over all seeds together; None for a class without samples.
    """

    top1: list[float]
    top5: list[float] | None
    mean_top1_by_class: list[float | None]


def rank_true_class_from_zero(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each sample's true class among its logits; 0 is first.

    Ties count against the true class: an equal logit of another class ranks first, so that a classifier of
    constant logits is never right.

    Parameters
    ----------
    logits : Tensor, shape (..., sample, class)
        FiniteFloat.
    labels : Tensor of int64, shape (sample,)

    Returns
    -------
    Tensor of int64, shape (..., sample)

    Raises
    ------
    FloatingPointError
        If a logit is not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("logits are not finite: the classifier diverged or its features are not")
    true_logit = logits.gather(-1, labels.expand(logits.shape[:-1])[..., None])
    return (logits >= true_logit).sum(-1) - 1


def iterate_logits_with_labels(
    heads: LinearHeads, features: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of blocks of samples, shape (seed, sample, class), with their labels."""
    for block, y in zip(
        torch.split(features, MAX_BATCH_SAMPLES), torch.split(labels, MAX_BATCH_SAMPLES), strict=True
    ):
        yield block @ heads.weight.transpose(1, 2) + heads.bias[:, None], y


def compute_accuracy_by_seed(heads: LinearHeads, features: Tensor, labels: Tensor) -> AccuracyBySeed:
    """Return the accuracy of every head.

    Parameters
    ----------
    heads : LinearHeads
    features : Tensor, shape (sample, feature)
    labels : Tensor of int64, shape (sample,)

    Returns
    -------
    AccuracyBySeed
    """
    blocks = iterate_logits_with_labels(heads, features, labels)
    ranks = torch.cat([rank_true_class_from_zero(logits, y) for logits, y in blocks], dim=1)

    def fraction_within(first: int) -> list[float]:
        return (ranks < first).double().mean(1).tolist()

    classes = heads.weight.shape[1]
    return AccuracyBySeed(
        fraction_within(1),
        fraction_within(TOP_K) if classes >= TOP_K else None,
        compute_accuracy_by_class(ranks == 0, labels, classes),
    )


def compute_accuracy_by_class(
    is_correct_by_seed: Tensor, labels: Tensor, class_count: int
) -> list[float | None]:
    """Return the accuracy on every class's samples, over all seeds; None for a class without samples.

    Parameters
    ----------
    is_correct_by_seed : Tensor of bool, shape (seed, sample)
    labels : Tensor of int64, shape (sample,)
    class_count : int
    """
    samples = torch.bincount(labels, minlength=class_count).tolist()
    correct = torch.bincount(labels, is_correct_by_seed.double().mean(0), minlength=class_count).tolist()
    return [hits / count if count else None for hits, count in zip(correct, samples, strict=True)]


def compute_summed_confusion_matrix(heads: LinearHeads, features: Tensor, labels: Tensor) -> Tensor:
    """Return the confusion matrix, summed over all heads.

    A tie with the true class counts as the other one, as in :func:`rank_true_class_from_zero`.

    Parameters
    ----------
    heads : LinearHeads
    features : Tensor, shape (sample, feature)
    labels : Tensor of int64, shape (sample,)

    Returns
    -------
    Tensor of int64, shape (class, class)
        Rows are the true classes, columns the predicted ones.
    """
    classes = heads.weight.shape[1]
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    for logits, y in iterate_logits_with_labels(heads, features, labels):
        true_class = y.expand(logits.shape[:-1])[..., None]
        true_logit = logits.gather(-1, true_class)[..., 0]
        best_other_logit, best_other = logits.scatter(-1, true_class, -torch.inf).max(-1)
        predicted = torch.where(true_logit > best_other_logit, y, best_other)
        counts += torch.bincount((y * classes + predicted).flatten(), minlength=classes * classes)
    return counts.view(classes, classes)


def make_nearest_mean_head(class_means: Tensor) -> SingleLinearHead:
    """Return the nearest-class-mean classifier as a linear head.

    ``|x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2)``, so the nearest mean has the largest ``x.m - |m|^2 / 2``.

    Parameters
    ----------
    class_means : Tensor, shape (class, feature)

    Returns
    -------
    SingleLinearHead
    """
    return LinearHeads(class_means[None], -class_means.square().sum(1)[None] / 2)
