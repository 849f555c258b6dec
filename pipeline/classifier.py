"""The linear classifier of all real data: its penalty chosen on a part of them, then fitted to all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.pipeline.folds import Mask, at_most, cut_folds
from sfm.pipeline.logistic import (
    Fit,
    PassCallback,
    Spread,
    fit,
    ignore_pass,
    mean_cross_entropy,
    on_raw_features,
    spread_of,
    standardised,
)
from sfm.pipeline.moments import Moments
from sfm.pipeline.staging import Staged
from sfm.stats_store.accuracy import top_accuracies

SOLVER = "multinomial logistic regression, L-BFGS, L2 chosen on a part of the training split"

L2_PATH = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""Penalties tried, from strong to weak; each fit starts at the one before."""

STRONG_L2 = (10.0, 3.0)
"""Tried before these, of few samples."""

PATH_TOLERANCE = 1e-2
"""Fits that only choose the penalty need not be exact; the final one is held to ``TOLERANCE``."""

VALIDATION_EVERY = 10

CHOOSING_ROWS = 16_384
"""Of more samples than these, as many of each class choose the penalty."""

CHOOSING_PER_CLASS = 64
"""Of classes with more samples, no fewer choose it."""

VALIDATING_ROWS = 1000
"""Folds are validated on in turn until so many samples have been, or ``MOST_FOLDS``."""

MOST_FOLDS = 5

FEW_ROWS = 4096
"""Of no more samples than these, validation also chooses between the two scalings of features."""


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of raw features: ``logits = feature @ weight.T + bias``.

    Attributes
    ----------
    weight : ndarray of float32, shape (C, D)
    bias : ndarray of float32, shape (C,)
    l2 : float
    iterations : int
        Of the final fit.
    converged : bool
        Whether the largest entry of the gradient, times C, fell to ``TOLERANCE``.
    common_scale : bool
        Whether one number scales all features that the penalty is on the weights of, not each its deviation.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    l2: float
    iterations: int
    converged: bool
    common_scale: bool = False

    @property
    def solver(self) -> str:
        """Say how it was trained."""
        return f"{SOLVER}, {'one scale for all features' if self.common_scale else 'standardised features'}"


@dataclass(frozen=True)
class Fold:
    """Rows that are fitted, and samples that judge the fit.

    Attributes
    ----------
    rows : iterable of (features, labels)
        Standardised; see ``standardised``.
    samples : int
        How many rows there are.
    validation : Staged
        Raw; without views.
    """

    rows: Iterable[tuple[Tensor, Tensor]]
    samples: int
    validation: Staged


@dataclass(frozen=True)
class Choice:
    """A penalty that was chosen.

    Attributes
    ----------
    l2 : float
        For as many samples as are given to ``train_classifier``.
    spread : Spread
        How features are scaled.
    start : Fit
        A fit with this penalty on a part of the samples.
    """

    l2: float
    spread: Spread
    start: Fit


def cut_rows(
    looks: Sequence[Staged], labels: npt.NDArray[np.int32], held: Mask, spread: Spread, device: torch.device
) -> Fold:
    """Fit on what is not held out and validate on the rest; of many samples, on as many of each class.

    Images that validate do so without their views, which no fit sees either.
    """
    classes = int(labels.max()) + 1
    fitted, validating = ~held, held.copy()
    most = max(CHOOSING_PER_CLASS, CHOOSING_ROWS // (classes * len(looks)))
    if len(looks) * len(labels) > CHOOSING_ROWS:
        fitted[fitted] = at_most(labels[fitted], most)
        validating[validating] = at_most(labels[validating], most)
    samples = len(looks) * int(fitted.sum())
    rows = standardised([look.only(fitted) for look in looks], samples, spread, device)
    return Fold(rows, samples, looks[0].only(validating))


def follow_path(
    folds: Sequence[Fold],
    zero: Fit,
    spread: Spread,
    device: torch.device,
    path: Sequence[float],
    on_pass: PassCallback,
) -> tuple[float, float, Fit]:
    """Return the least cross-entropy on all folds together, its penalty, and the fit of the first fold.

    The path from strong to weak penalties ends when that loss rises.
    """
    sizes = [len(fold.validation.all_labels()) for fold in folds]
    best_loss, best_l2, best = float("inf"), path[0], [zero] * len(folds)
    for l2 in path:
        fits, losses = [], []
        for fold, start in zip(folds, best, strict=True):
            found = fit(fold.rows, fold.samples, spread, l2, start, device, PATH_TOLERANCE, on_pass)
            weight, bias = on_raw_features(found.weight, found.bias, spread)
            losses.append(mean_cross_entropy(fold.validation, weight.float().numpy(), bias.float().numpy()))
            fits.append(found)
        loss = float(np.average(losses, weights=sizes))
        if not loss < best_loss:
            break
        best_loss, best_l2, best = loss, l2, fits
    return best_loss, best_l2, best[0]


def choose_penalty(
    looks: Sequence[Staged],
    spreads: Sequence[Spread],
    device: torch.device,
    path: Sequence[float] = L2_PATH,
    on_pass: PassCallback = ignore_pass,
) -> Choice:
    """Return the penalty, and the scaling, with the least cross-entropy on samples that the fit did not see.

    One tenth of the samples validates; of few samples, several tenths in turn. Of more than
    ``CHOOSING_ROWS``, as many of each class are fitted; the penalty on the mean loss then shrinks as one over
    the number of samples, as the weight of a fixed prior does. If no class has two samples, the penalty in
    the middle of the path is taken, with the last of the scalings.

    Parameters
    ----------
    looks : sequence of Staged
        Training features, and those of their views.
    spreads : sequence of Spread
        Scalings to choose from.
    device : torch.device
    path : sequence of float
        Penalties to choose from, strongest first.
    """
    labels = looks[0].all_labels()
    zero = zero_fit(int(labels.max()) + 1, len(spreads[0].mean))
    held = cut_folds(labels, VALIDATION_EVERY, VALIDATING_ROWS, MOST_FOLDS)
    if not held:
        return Choice(path[len(path) // 2], spreads[-1], zero)
    found = []
    for spread in spreads:
        folds = [cut_rows(looks, labels, own, spread, device) for own in held]
        loss, l2, start = follow_path(folds, zero, spread, device, path, on_pass)
        share = folds[0].samples / (len(looks) * int((~held[0]).sum()))
        found.append((loss, Choice(l2 * share, spread, start)))
    return min(found, key=lambda each: each[0])[1]


def zero_fit(classes: int, features: int) -> Fit:
    """Return the classifier that knows nothing."""
    weight = torch.zeros(classes, features, dtype=torch.float64)
    return Fit(weight, torch.zeros(classes, dtype=torch.float64), 0, False)


def train_classifier(
    train: Staged,
    moments: Moments,
    device: torch.device,
    views: Sequence[Staged] = (),
    path: Sequence[float] = L2_PATH,
    on_pass: PassCallback = ignore_pass,
) -> Classifier:
    """Choose the L2 penalty on a part of the training samples, then fit on all of them.

    Of at most ``FEW_ROWS`` samples, stronger penalties are tried too, and the scaling of the features is
    chosen as well: deviations of single features are noise then, and dividing by them can cost more than a
    classifier gains over the nearest class mean.

    Parameters
    ----------
    train : Staged
        Training features and labels.
    moments : Moments
        Of the same samples; they standardise the features.
    device : torch.device
        Where products are computed.
    views : sequence of Staged
        Features of augmented views of the same samples, in the same order; the classifier learns from them
        too.
    path : sequence of float
        Penalties to choose from, strongest first.
    on_pass : callable, optional
        Told how many rows a pass was over, after each.
    """
    looks = [train, *views]
    samples = len(looks) * len(train.all_labels())
    spreads = [spread_of(moments, all_axes=bool(views))]
    if len(train.all_labels()) <= FEW_ROWS:
        spreads.append(spread_of(moments, common_scale=True, all_axes=bool(views)))
        path = [*STRONG_L2, *path]
    choice = choose_penalty(looks, spreads, device, path, on_pass)
    spread, rows = choice.spread, standardised(looks, samples, choice.spread, device)
    final = fit(rows, samples, spread, choice.l2, choice.start, device, on_pass=on_pass)
    weight, bias = (x.float().numpy() for x in on_raw_features(final.weight, final.bias, spread))
    return Classifier(weight, bias, choice.l2, final.iterations, final.converged, spread.common_scale)


def accuracies(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]], classifier: Classifier
) -> tuple[float | None, float | None]:
    """Return top-1 and top-5 accuracy as fractions; see :func:`~sfm.stats_store.accuracy.top_accuracies`."""
    return top_accuracies(blocks, classifier.weight, classifier.bias)
