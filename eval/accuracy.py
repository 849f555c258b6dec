"""Top-1 and top-5 accuracy of linear classifiers on held-out features."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5
SAMPLES_AT_ONCE = 4096


@dataclass(frozen=True)
class Heads:
    """Linear classifiers of one feature space, one per seed: ``logits = features @ weight.T + bias``.

    Attributes
    ----------
    weight : Tensor, shape (seed, class, feature)
    bias : Tensor, shape (seed, class)
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares of samples classified rightly, one figure per seed.

    Attributes
    ----------
    top1 : list of float
    top5 : list of float or None
        None with fewer than five classes: the right class is then always among the first five.
    per_class : list of (float or None)
        Top-1 by class, over all seeds together; None for a class without samples.
    """

    top1: list[float]
    top5: list[float] | None
    per_class: list[float | None]


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the place of each sample's right class among its logits; 0 is first.

    Ties are not resolved in favour of the right class: an equal logit of another class comes first, so that
    a classifier that says the same of every class is never right.

    Parameters
    ----------
    logits : Tensor, shape (..., sample, class)
        Finite.
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
    right = logits.gather(-1, labels.expand(logits.shape[:-1])[..., None])
    return (logits >= right).sum(-1) - 1


def accuracy(heads: Heads, features: Tensor, labels: Tensor) -> Accuracy:
    """Classify features with every head.

    Parameters
    ----------
    heads : Heads
    features : Tensor, shape (sample, feature)
    labels : Tensor of int64, shape (sample,)

    Returns
    -------
    Accuracy
    """
    blocks = zip(torch.split(features, SAMPLES_AT_ONCE), torch.split(labels, SAMPLES_AT_ONCE), strict=True)
    place = torch.cat(
        [ranks(block @ heads.weight.transpose(1, 2) + heads.bias[:, None], y) for block, y in blocks], dim=1
    )

    def share(first: int) -> list[float]:
        return (place < first).double().mean(1).tolist()

    classes = heads.weight.shape[1]
    return Accuracy(share(1), share(TOP) if classes >= TOP else None, by_class(place == 0, labels, classes))


def by_class(right: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Return the share of every class's samples that are classified rightly, over all seeds.

    Parameters
    ----------
    right : Tensor of bool, shape (seed, sample)
    labels : Tensor of int64, shape (sample,)
    classes : int
    """
    samples = torch.bincount(labels, minlength=classes).tolist()
    found = torch.bincount(labels, right.double().mean(0), minlength=classes).tolist()
    return [share / count if count else None for share, count in zip(found, samples, strict=True)]


def confusion(heads: Heads, features: Tensor, labels: Tensor) -> Tensor:
    """Count what every class was taken for, over all heads together.

    A tie with the right class counts as the other one, as in :func:`ranks`.

    Parameters
    ----------
    heads : Heads
    features : Tensor, shape (sample, feature)
    labels : Tensor of int64, shape (sample,)

    Returns
    -------
    Tensor of int64, shape (class, class)
        Rows are the right classes, columns the predicted ones.
    """
    classes = heads.weight.shape[1]
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    for block, y in zip(
        torch.split(features, SAMPLES_AT_ONCE), torch.split(labels, SAMPLES_AT_ONCE), strict=True
    ):
        logits = block @ heads.weight.transpose(1, 2) + heads.bias[:, None]
        own = y.expand(logits.shape[:-1])[..., None]
        right = logits.gather(-1, own)[..., 0]
        best, other = logits.scatter(-1, own, -torch.inf).max(-1)
        predicted = torch.where(right > best, y, other)
        counts += torch.bincount((y * classes + predicted).flatten(), minlength=classes * classes)
    return counts.view(classes, classes)


def nearest_mean_head(means: Tensor) -> Heads:
    """Write "the class whose mean is nearest" as a linear classifier.

    ``|x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2)``, so the nearest mean has the largest ``x.m - |m|^2 / 2``.

    Parameters
    ----------
    means : Tensor, shape (class, feature)

    Returns
    -------
    Heads
        One.
    """
    return Heads(means[None], -means.square().sum(1)[None] / 2)
