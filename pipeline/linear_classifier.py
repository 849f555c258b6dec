"""Train the linear classifier: choose the penalty on a part of the samples, then fit all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.class_means import (
    choose_common_logit_factor,
    compute_sample_losses,
    fit_nearest_mean_classifier,
    scale_logits,
)
from sfm.pipeline.feature_scaling import (
    FeaturesAndLabels,
    FeatureScaling,
    compute_feature_scaling,
    convert_classifier_to_raw_features,
    standardise_rows,
)
from sfm.pipeline.folds import Mask, make_even_per_class_mask, make_validation_masks
from sfm.pipeline.logistic import (
    GRADIENT_TOLERANCE,
    LogisticFit,
    PassRowsCallback,
    fit_logistic,
    ignore_pass_rows,
    make_zero_fit,
)
from sfm.pipeline.staged_features import StagedFeatures
from sfm.stats_store.class_moments import ClassMoments
from sfm.stats_store.classifier_accuracy import compute_top1_top5_accuracies

SOLVER = "multinomial logistic regression, L-BFGS, L2 chosen on a part of the training split"

L2_PATH = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""Penalties to try, from strong to weak; each fit starts at the one before."""

STRONG_L2 = (1000.0, 100.0, 10.0, 3.0)
"""Penalties to try before these, with few samples."""

PATH_TOLERANCE = 1e-2
"""Tolerance of fits that only choose the penalty; that of the final fit is ``GRADIENT_TOLERANCE``."""

MAX_PATH_ITERATIONS = 50
"""Maximum iterations of fits that only choose the penalty: few samples may be separable."""

VALIDATION_FOLDS = 10

MAX_SELECTION_ROWS = 16_384
"""Maximum number of samples to choose the penalty on; of more, take equally many of each class."""

MIN_SELECTION_ROWS_PER_CLASS = 64
"""Minimum number of samples per class to choose the penalty on, if there are as many."""

MIN_VALIDATION_ROWS = 1000
"""Folds are added until they hold this number of samples, or there are ``MAX_FOLDS``."""

MAX_FOLDS = 5

TIE_STANDARD_ERRORS = 2.0
"""Differences up to this many standard errors are ties, such as one differently classified sample."""

MARGIN_STANDARD_ERRORS = 4.0
"""Advantage that another candidate needs. On a few dozen samples, a classifier of standardised features may
have a lower cross-entropy than one near the class means, and a much lower accuracy on other samples."""

MAX_SMALL_DATASET_ROWS = 4096
"""Up to this number of samples, the penalty is on the distance of weights from the class means."""


@dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier of raw features: ``logits = feature @ weight.T + bias``.

    Attributes
    ----------
    weight : ndarray of float32, shape (C, D)
    bias : ndarray of float32, shape (C,)
    l2 : float
    iterations : int
        Of the final fit.
    converged : bool
        Whether the largest entry of the gradient, times C, fell to ``GRADIENT_TOLERANCE``.
    solver_description : str
        Description of the training, for the entry's card.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    l2: float
    iterations: int
    converged: bool
    solver_description: str


@dataclass(frozen=True)
class ValidationFold:
    """Rows to fit, and samples to validate the fit on.

    Attributes
    ----------
    training_rows : iterable of (features, labels)
        Standardised; see ``standardise_rows``.
    training_row_count : int
        Number of rows.
    validation_features : StagedFeatures
        Raw features, without views.
    """

    training_rows: Iterable[FeaturesAndLabels]
    training_row_count: int
    validation_features: StagedFeatures


@dataclass(frozen=True)
class PenaltyPathCandidate:
    """A penalty to try: how features are scaled, what weights are shrunk to, and strengths to choose from.

    Attributes
    ----------
    scaling : FeatureScaling
    shrinks_to_class_means : bool
        Shrink to the nearest class mean, not to zero.
    l2_path : sequence of float
        Penalties to choose from, strongest first.
    """

    scaling: FeatureScaling
    shrinks_to_class_means: bool
    l2_path: Sequence[float]


@dataclass(frozen=True)
class ChosenPenalty:
    """The penalty that validation chose.

    Attributes
    ----------
    l2 : float
        For the number of samples given to ``train_classifier``.
    scaling : FeatureScaling
    start_fit : LogisticFit
        Fit with this penalty on a part of the samples.
    class_means_logit_factor : float
        Factor of the logits of the nearest class mean that weights are shrunk to; 0 if shrunk to zero.
    """

    l2: float
    scaling: FeatureScaling
    start_fit: LogisticFit
    class_means_logit_factor: float = 0.0


def make_validation_fold(
    image_and_view_features: Sequence[StagedFeatures],
    labels: npt.NDArray[np.int32],
    held_out_mask: Mask,
    scaling: FeatureScaling,
    device: torch.device,
) -> ValidationFold:
    """Return a fold that validates on held-out samples; of many samples, with equally many of each class.

    Views of the validation images are neither fitted nor used for validation.
    """
    classes = int(labels.max()) + 1
    fitted, validating = ~held_out_mask, held_out_mask.copy()
    max_per_class = max(
        MIN_SELECTION_ROWS_PER_CLASS, MAX_SELECTION_ROWS // (classes * len(image_and_view_features))
    )
    if len(image_and_view_features) * len(labels) > MAX_SELECTION_ROWS:
        fitted[fitted] = make_even_per_class_mask(labels[fitted], max_per_class)
        validating[validating] = make_even_per_class_mask(labels[validating], max_per_class)
    samples = len(image_and_view_features) * int(fitted.sum())
    rows = standardise_rows(
        [features.select_rows(fitted) for features in image_and_view_features], samples, scaling, device
    )
    return ValidationFold(rows, samples, image_and_view_features[0].select_rows(validating))


@dataclass(frozen=True)
class PenaltyScore:
    """A penalty, and its losses on the folds.

    Attributes
    ----------
    l2 : float
    validation_losses : ndarray of float64, shape (n,)
        Cross-entropy on every validation sample of all folds.
    first_fold_fit : LogisticFit
        Fit of the first fold.
    """

    l2: float
    validation_losses: npt.NDArray[np.float64]
    first_fold_fit: LogisticFit


def count_standard_errors_between(worse: PenaltyScore, better: PenaltyScore) -> float:
    """Return how many standard errors one mean cross-entropy is above another, on the same samples."""
    difference = worse.validation_losses - better.validation_losses
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) / error if error > 0 else 0.0


def search_penalty_path(
    folds: Sequence[ValidationFold],
    prior_fits: Sequence[LogisticFit],
    candidate: PenaltyPathCandidate,
    device: torch.device,
    report_pass_rows: PassRowsCallback,
) -> PenaltyScore:
    """Try penalties from strong to weak, until the cross-entropy on all folds together rises.

    The first fits start at their priors, each other at the one before. The result is the penalty with
    the lowest cross-entropy; towards the class means, the strongest that is within
    ``TIE_STANDARD_ERRORS`` standard errors of it.
    """
    scaling, fits = candidate.scaling, list(prior_fits)
    scores: list[PenaltyScore] = []
    for l2 in candidate.l2_path:
        fits = [
            fit_logistic(
                *(fold.training_rows, fold.training_row_count, scaling, l2, start, device),
                *(PATH_TOLERANCE, report_pass_rows, prior, MAX_PATH_ITERATIONS),
            )
            for fold, start, prior in zip(folds, fits, prior_fits, strict=True)
        ]
        losses = [
            compute_sample_losses(fit, scaling, fold.validation_features)
            for fit, fold in zip(fits, folds, strict=True)
        ]
        score = PenaltyScore(l2, np.concatenate(losses), fits[0])
        if scores and not score.validation_losses.mean() < scores[-1].validation_losses.mean():
            break
        scores.append(score)
    if not candidate.shrinks_to_class_means:
        return scores[-1]
    return next(
        score for score in scores if count_standard_errors_between(score, scores[-1]) <= TIE_STANDARD_ERRORS
    )


def choose_scaling_and_penalty(
    image_and_view_features: Sequence[StagedFeatures],
    candidates: Sequence[PenaltyPathCandidate],
    device: torch.device,
    report_pass_rows: PassRowsCallback = ignore_pass_rows,
) -> ChosenPenalty:
    """Choose a candidate and its penalty by the cross-entropy on validation samples.

    Another than the first candidate must be better by ``MARGIN_STANDARD_ERRORS`` standard errors. One tenth
    of the samples validates; of few samples, several tenths in turn. Of more than ``MAX_SELECTION_ROWS``, as
    many of each class are fitted; the penalty on the mean loss then shrinks as one over the number of
    samples, as the weight of a fixed prior does. If no class has two samples, the penalty in the middle of
    the first candidate's path is taken, towards zero.

    Parameters
    ----------
    image_and_view_features : sequence of StagedFeatures
        Training features, and those of their views.
    candidates : sequence of PenaltyPathCandidate
    device : torch.device
    """
    labels = image_and_view_features[0].concatenate_labels()
    zero = make_zero_fit(int(labels.max()) + 1, len(candidates[0].scaling.mean))
    held_out_masks = make_validation_masks(labels, VALIDATION_FOLDS, MIN_VALIDATION_ROWS, MAX_FOLDS)
    if not held_out_masks:
        first = candidates[0]
        return ChosenPenalty(first.l2_path[len(first.l2_path) // 2], first.scaling, zero)
    best_score: PenaltyScore | None = None
    best = ChosenPenalty(0.0, candidates[0].scaling, zero)
    for candidate in candidates:
        scaling, factor = candidate.scaling, 0.0
        folds = [
            make_validation_fold(image_and_view_features, labels, held_out, scaling, device)
            for held_out in held_out_masks
        ]
        priors = [zero] * len(folds)
        if candidate.shrinks_to_class_means:
            means = [fit_nearest_mean_classifier(fold.training_rows, *zero.weight.shape) for fold in folds]
            factor = choose_common_logit_factor(means, [fold.validation_features for fold in folds], scaling)
            priors = [scale_logits(mean, factor) for mean in means]
        score = search_penalty_path(folds, priors, candidate, device, report_pass_rows)
        if best_score is None or count_standard_errors_between(best_score, score) > MARGIN_STANDARD_ERRORS:
            share = folds[0].training_row_count / (
                len(image_and_view_features) * int((~held_out_masks[0]).sum())
            )
            best_score, best = score, ChosenPenalty(score.l2 * share, scaling, score.first_fold_fit, factor)
    return best


def list_penalty_path_candidates(
    image_and_view_features: Sequence[StagedFeatures], moments: ClassMoments, l2_path: Sequence[float]
) -> list[PenaltyPathCandidate]:
    """Return the candidates that validation chooses from; for many samples, there is one."""
    if moments.count.sum() > MAX_SMALL_DATASET_ROWS:
        # Views may vary along axes along which the images themselves do not.
        return [
            PenaltyPathCandidate(
                compute_feature_scaling(moments, keep_constant_axes=len(image_and_view_features) > 1),
                False,
                l2_path,
            )
        ]
    if len(image_and_view_features) > 1:
        moments = accumulate_moments(chain.from_iterable(image_and_view_features), *moments.mean.shape)
    common = compute_feature_scaling(moments, use_common_scale=True, keep_constant_axes=False)
    plain = compute_feature_scaling(moments, keep_constant_axes=False)
    return [
        PenaltyPathCandidate(common, True, [*STRONG_L2, *l2_path]),
        PenaltyPathCandidate(plain, False, l2_path),
    ]


def train_classifier(
    train: StagedFeatures,
    moments: ClassMoments,
    device: torch.device,
    view_features: Sequence[StagedFeatures] = (),
    l2_path: Sequence[float] = L2_PATH,
    report_pass_rows: PassRowsCallback = ignore_pass_rows,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> LinearClassifier:
    """Choose the L2 penalty on a part of the training samples, then fit on all of them.

    With at most ``MAX_SMALL_DATASET_ROWS`` samples, weights shrink to those of the nearest-class-mean
    classifier, a strong baseline for few samples, and features share one scale, since deviations of single
    features are noisy. Features are standardised and weights shrink to zero if validation is clearly better
    with them, and always with more samples.

    Parameters
    ----------
    train : StagedFeatures
        Training features and labels.
    moments : ClassMoments
        Of the same samples; they standardise the features.
    device : torch.device
        Where products are computed.
    view_features : sequence of StagedFeatures
        Features of augmented views of the same samples, in the same order; they are training
        samples, too.
    l2_path : sequence of float
        Penalties to choose from, strongest first.
    report_pass_rows : callable, optional
        Called after every pass with the number of its rows.
    gradient_tolerance : float
        Of the final fit.
    """
    image_and_view_features = [train, *view_features]
    samples = len(image_and_view_features) * len(train.concatenate_labels())
    choice = choose_scaling_and_penalty(
        image_and_view_features,
        list_penalty_path_candidates(image_and_view_features, moments, l2_path),
        device,
        report_pass_rows,
    )
    scaling, rows = choice.scaling, standardise_rows(image_and_view_features, samples, choice.scaling, device)
    prior, start = None, choice.start_fit
    if choice.class_means_logit_factor:
        start = prior = scale_logits(
            fit_nearest_mean_classifier(rows, *moments.mean.shape), choice.class_means_logit_factor
        )
    final = fit_logistic(
        rows, samples, scaling, choice.l2, start, device, gradient_tolerance, report_pass_rows, prior
    )
    weight, bias = (
        x.float().numpy() for x in convert_classifier_to_raw_features(final.weight, final.bias, scaling)
    )
    return LinearClassifier(
        weight,
        bias,
        choice.l2,
        final.iterations,
        final.converged,
        describe_solver(has_common_scale=scaling.common_scale, shrinks_to_class_means=prior is not None),
    )


def describe_solver(*, has_common_scale: bool, shrinks_to_class_means: bool) -> str:
    """Return a description of the training, for the entry's card.

    Parameters
    ----------
    has_common_scale : bool
        Whether the penalty is on weights of features divided by one number, not each by its deviation.
    shrinks_to_class_means : bool
        Whether the penalty is on the distance of weights from those of the nearest class mean, not from zero.
    """
    scaling = "one scale for all features" if has_common_scale else "standardised features"
    return f"{SOLVER}, {scaling}{', towards the nearest class mean' * shrinks_to_class_means}"


def measure_top1_and_top5(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]], classifier: LinearClassifier
) -> tuple[float | None, float | None]:
    """Return top-1 and top-5 accuracy as fractions; see `compute_top1_top5_accuracies`."""
    return compute_top1_top5_accuracies(blocks, classifier.weight, classifier.bias)
