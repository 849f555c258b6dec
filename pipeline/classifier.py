"""The linear classifier of all real data: its penalty chosen on a part of them, then fitted to all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.pipeline.class_means import calibrate, class_mean_fit, losses_on, scale_logits
from sfm.pipeline.folds import Mask, at_most, cut_folds
from sfm.pipeline.logistic import (
    TOLERANCE,
    Fit,
    PassCallback,
    Spread,
    fit,
    ignore_pass,
    on_raw_features,
    spread_of,
    standardised,
    zero_fit,
)
from sfm.pipeline.moments import Moments, accumulate
from sfm.pipeline.staging import Staged
from sfm.stats_store.classifier_accuracy import compute_top_accuracies

SOLVER = "multinomial logistic regression, L-BFGS, L2 chosen on a part of the training split"

L2_PATH = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""Penalties tried, from strong to weak; each fit starts at the one before."""

STRONG_L2 = (1000.0, 100.0, 10.0, 3.0)
"""Tried before these, of few samples."""

PATH_TOLERANCE = 1e-2
"""Fits that only choose the penalty need not be exact; the final one is held to ``TOLERANCE``."""

PATH_ITERATIONS = 50
"""Nor may they take long: with weak penalties, few samples can be told apart ever more clearly."""

VALIDATION_EVERY = 10

CHOOSING_ROWS = 16_384
"""Of more samples than these, as many of each class choose the penalty."""

CHOOSING_PER_CLASS = 64
"""Of classes with more samples, no fewer choose it."""

VALIDATING_ROWS = 1000
"""Folds are validated on in turn until so many samples have been, or ``MOST_FOLDS``."""

MOST_FOLDS = 5

WITHIN = 2.0
"""Standard errors; a single sample that one penalty gets right and another wrong makes one."""

MARGIN = 4.0
"""Standard errors. On a few dozen samples, a classifier of standardised features may well have a lower
cross-entropy than one near the class means, and a much lower accuracy on others."""

FEW_ROWS = 4096
"""Of no more samples than these, the penalty is on how far weights are from the class means."""


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
    towards_means : bool
        Whether the penalty is on how far weights are from those of the nearest class mean, not from zero.
    common_scale : bool
        Whether one number scales all features that the penalty is on the weights of, not each its deviation.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    l2: float
    iterations: int
    converged: bool
    common_scale: bool = False
    towards_means: bool = False

    @property
    def solver(self) -> str:
        """Say how it was trained."""
        scaling = "one scale for all features" if self.common_scale else "standardised features"
        return f"{SOLVER}, {scaling}{', towards the nearest class mean' * self.towards_means}"


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
class Candidate:
    """A way to penalise: how features are scaled, what weights are shrunk to, and how strongly.

    Attributes
    ----------
    spread : Spread
    towards_means : bool
        Shrink to the nearest class mean, not to zero.
    path : sequence of float
        Penalties to choose from, strongest first.
    """

    spread: Spread
    towards_means: bool
    path: Sequence[float]


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
    means_factor : float
        Of the logits of the nearest class mean that weights are shrunk to; 0 if they are shrunk to zero.
    """

    l2: float
    spread: Spread
    start: Fit
    means_factor: float = 0.0


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


@dataclass(frozen=True)
class Judged:
    """A penalty, and how the folds judge it.

    Attributes
    ----------
    l2 : float
    losses : ndarray of float64, shape (n,)
        Cross-entropy on every sample of all folds.
    start : Fit
        The fit of the first fold.
    """

    l2: float
    losses: npt.NDArray[np.float64]
    start: Fit


def standard_errors(worse: Judged, better: Judged) -> float:
    """Return by how many standard errors one mean cross-entropy is above another, on the same samples."""
    difference = worse.losses - better.losses
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) / error if error > 0 else 0.0


def follow_path(
    folds: Sequence[Fold],
    priors: Sequence[Fit],
    candidate: Candidate,
    device: torch.device,
    on_pass: PassCallback,
) -> Judged:
    """Try penalties from strong to weak, until the cross-entropy on all folds together rises.

    The fits start at their priors, and each at the one before. Returned is the penalty with the least
    cross-entropy; towards the class means, the strongest that is within ``WITHIN`` standard errors of it.
    """
    spread, fits = candidate.spread, list(priors)
    tried: list[Judged] = []
    for l2 in candidate.path:
        fits = [
            fit(
                fold.rows,
                fold.samples,
                spread,
                l2,
                start,
                device,
                PATH_TOLERANCE,
                on_pass,
                prior,
                PATH_ITERATIONS,
            )
            for fold, start, prior in zip(folds, fits, priors, strict=True)
        ]
        losses = [losses_on(own, spread, fold.validation) for own, fold in zip(fits, folds, strict=True)]
        judged = Judged(l2, np.concatenate(losses), fits[0])
        if tried and not judged.losses.mean() < tried[-1].losses.mean():
            break
        tried.append(judged)
    if not candidate.towards_means:
        return tried[-1]
    return next(each for each in tried if standard_errors(each, tried[-1]) <= WITHIN)


def choose_penalty(
    looks: Sequence[Staged],
    candidates: Sequence[Candidate],
    device: torch.device,
    on_pass: PassCallback = ignore_pass,
) -> Choice:
    """Choose a candidate and its penalty by the cross-entropy on samples that the fit did not see.

    Another than the first candidate must be better by ``MARGIN`` standard errors. One tenth of the samples
    validates; of few samples, several tenths in turn. Of more than ``CHOOSING_ROWS``, as many of each class
    are fitted; the penalty on the mean loss then shrinks as one over the number of samples, as the weight of
    a fixed prior does. If no class has two samples, the penalty in the middle of the first candidate's path
    is taken, towards zero.

    Parameters
    ----------
    looks : sequence of Staged
        Training features, and those of their views.
    candidates : sequence of Candidate
    device : torch.device
    """
    labels = looks[0].all_labels()
    zero = zero_fit(int(labels.max()) + 1, len(candidates[0].spread.mean))
    held = cut_folds(labels, VALIDATION_EVERY, VALIDATING_ROWS, MOST_FOLDS)
    if not held:
        first = candidates[0]
        return Choice(first.path[len(first.path) // 2], first.spread, zero)
    best: tuple[Judged, Choice] | None = None
    for candidate in candidates:
        spread, factor = candidate.spread, 0.0
        folds = [cut_rows(looks, labels, own, spread, device) for own in held]
        priors = [zero] * len(folds)
        if candidate.towards_means:
            means = [class_mean_fit(fold.rows, *zero.weight.shape) for fold in folds]
            factor = calibrate(means, [fold.validation for fold in folds], spread)
            priors = [scale_logits(mean, factor) for mean in means]
        judged = follow_path(folds, priors, candidate, device, on_pass)
        if best is None or standard_errors(best[0], judged) > MARGIN:
            share = folds[0].samples / (len(looks) * int((~held[0]).sum()))
            best = judged, Choice(judged.l2 * share, spread, judged.start, factor)
    assert best is not None
    return best[1]


def list_candidates(looks: Sequence[Staged], moments: Moments, path: Sequence[float]) -> list[Candidate]:
    """Return the ways to penalise among which validation chooses: of many samples, there is one."""
    if moments.count.sum() > FEW_ROWS:
        # Views may vary along axes along which their images do not.
        return [Candidate(spread_of(moments, all_axes=len(looks) > 1), False, path)]
    if len(looks) > 1:
        moments = accumulate(chain.from_iterable(looks), *moments.mean.shape)
    common = spread_of(moments, common_scale=True, all_axes=False)
    plain = spread_of(moments, all_axes=False)
    return [Candidate(common, True, [*STRONG_L2, *path]), Candidate(plain, False, path)]


def train_classifier(
    train: Staged,
    moments: Moments,
    device: torch.device,
    views: Sequence[Staged] = (),
    path: Sequence[float] = L2_PATH,
    on_pass: PassCallback = ignore_pass,
    tolerance: float = TOLERANCE,
) -> Classifier:
    """Choose the L2 penalty on a part of the training samples, then fit on all of them.

    Of at most ``FEW_ROWS`` samples, the penalty draws the weights to those of the nearest class mean, which
    is hard to beat then, on features of one common scale, since deviations of single ones are noise. Only
    where validation clearly says so are features standardised, and weights drawn to zero, as they are of
    more.

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
    tolerance : float
        Of the final fit.
    """
    looks = [train, *views]
    samples = len(looks) * len(train.all_labels())
    choice = choose_penalty(looks, list_candidates(looks, moments, path), device, on_pass)
    spread, rows = choice.spread, standardised(looks, samples, choice.spread, device)
    prior, start = None, choice.start
    if choice.means_factor:
        start = prior = scale_logits(class_mean_fit(rows, *moments.mean.shape), choice.means_factor)
    final = fit(rows, samples, spread, choice.l2, start, device, tolerance, on_pass, prior)
    weight, bias = (x.float().numpy() for x in on_raw_features(final.weight, final.bias, spread))
    return Classifier(
        weight, bias, choice.l2, final.iterations, final.converged, spread.common_scale, prior is not None
    )


def accuracies(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]], classifier: Classifier
) -> tuple[float | None, float | None]:
    """Return top-1 and top-5 accuracy as fractions; see :func:`~sfm.stats_store.classifier_accuracy.compute_top_accuracies`."""
    return compute_top_accuracies(blocks, classifier.weight, classifier.bias)
