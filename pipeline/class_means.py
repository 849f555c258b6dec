"""The nearest class mean as a linear classifier: a prior for classifiers of few samples."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from sfm.pipeline.feature_scaling import FeaturesAndLabels, FeatureScaling, convert_classifier_to_raw_features
from sfm.pipeline.logistic import LogisticFit, compute_cross_entropies
from sfm.pipeline.runtime import one_torch_thread
from sfm.pipeline.staged_features import StagedFeatures

MAX_LOGIT = 20.0
"""Maximum bias after scaling the logits: beyond it, all probabilities are 0 or 1."""

LOG_FACTOR_RANGE = 16.0
"""Natural logarithm of the largest factor over the smallest."""


def fit_nearest_mean_classifier(
    standardised_rows: Iterable[FeaturesAndLabels], class_count: int, feature_count: int
) -> LogisticFit:
    """Return "the class whose mean is nearest" as a linear classifier of standardised features.

    ``|x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2)``, so the nearest mean has the largest ``x.m - |m|^2 / 2``.

    Parameters
    ----------
    standardised_rows : iterable of (features, labels)
        Standardised; see ``standardise_rows``.
    """
    total = torch.zeros(class_count, feature_count, dtype=torch.float64)
    count = torch.zeros(class_count, dtype=torch.float64)
    with one_torch_thread():
        for x, y in standardised_rows:
            members = torch.nn.functional.one_hot(y, class_count).double()
            total += (members.T @ x.double()).cpu()
            count += members.sum(dim=0).cpu()
    mean = total / count.clamp(min=1)[:, None]
    return LogisticFit(mean, -mean.square().sum(dim=1) / 2, 0, False)


def scale_logits(fit: LogisticFit, logit_factor: float) -> LogisticFit:
    """Return a classifier with all logits multiplied by a factor."""
    return LogisticFit(fit.weight * logit_factor, fit.bias * logit_factor, fit.iterations, fit.converged)


def compute_sample_losses(
    fit: LogisticFit, scaling: FeatureScaling, raw_samples: StagedFeatures
) -> npt.NDArray[np.float64]:
    """Return the cross-entropy of a classifier of standardised features on every raw sample."""
    weight, bias = convert_classifier_to_raw_features(fit.weight, fit.bias, scaling)
    return compute_cross_entropies(raw_samples, weight.float().numpy(), bias.float().numpy())


def choose_common_logit_factor(
    fits: Sequence[LogisticFit],
    raw_validation_samples_by_fit: Sequence[StagedFeatures],
    scaling: FeatureScaling,
) -> float:
    """Return the factor of all fits' logits with the lowest cross-entropy, each fit on its own samples."""
    from scipy.optimize import minimize_scalar  # slow to import

    def compute_loss(log_factor: float) -> float:
        factor = float(np.exp(log_factor))
        losses = [
            compute_sample_losses(scale_logits(fit, factor), scaling, samples)
            for fit, samples in zip(fits, raw_validation_samples_by_fit, strict=True)
        ]
        return float(np.concatenate(losses).mean())

    largest_bias = max(float(fit.bias.abs().max()) for fit in fits)
    end = float(np.log(MAX_LOGIT / largest_bias)) if largest_bias > 0 else 0.0
    best = minimize_scalar(
        compute_loss, bounds=(end - LOG_FACTOR_RANGE, end), method="bounded", options={"xatol": 0.05}
    )
    return float(np.exp(best.x))
