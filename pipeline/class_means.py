"""The nearest class mean as a linear classifier, which of few samples the trained one may stay close to."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from sfm.pipeline.logistic import (
    FeatureScaling,
    LogisticFit,
    compute_cross_entropies,
    convert_to_raw_features,
)
from sfm.pipeline.runtime import one_torch_thread
from sfm.pipeline.staging import StagedFeatures

MAX_LOGIT = 20.0
"""The factor of the logits makes the largest bias no larger: beyond that, all probabilities are 0 or 1."""

LOG_FACTOR_RANGE = 16.0
"""Natural logarithm of the largest factor over the least."""


def fit_class_means(rows: Iterable[tuple[Tensor, Tensor]], classes: int, features: int) -> LogisticFit:
    """Write "the class whose mean is nearest" as a classifier of standardised features.

    ``|x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2)``, so the nearest mean has the largest ``x.m - |m|^2 / 2``.

    Parameters
    ----------
    rows : iterable of (features, labels)
        Standardised; see ``standardise_rows``.
    """
    total = torch.zeros(classes, features, dtype=torch.float64)
    count = torch.zeros(classes, dtype=torch.float64)
    with one_torch_thread():
        for x, y in rows:
            members = torch.nn.functional.one_hot(y, classes).double()
            total += (members.T @ x.double()).cpu()
            count += members.sum(dim=0).cpu()
    mean = total / count.clamp(min=1)[:, None]
    return LogisticFit(mean, -mean.square().sum(dim=1) / 2, 0, False)


def scale_logits(fit: LogisticFit, factor: float) -> LogisticFit:
    """Return a classifier with all logits multiplied."""
    return LogisticFit(fit.weight * factor, fit.bias * factor, fit.iterations, fit.converged)


def compute_losses(
    fit: LogisticFit, spread: FeatureScaling, samples: StagedFeatures
) -> npt.NDArray[np.float64]:
    """Return the cross-entropy on every raw sample, of a classifier of standardised features."""
    weight, bias = convert_to_raw_features(fit.weight, fit.bias, spread)
    return compute_cross_entropies(samples, weight.float().numpy(), bias.float().numpy())


def calibrate_logits(
    fits: Sequence[LogisticFit], validations: Sequence[StagedFeatures], spread: FeatureScaling
) -> float:
    """Return the factor of the logits of all fits with the least cross-entropy, each on its own samples."""

    def loss(log_factor: float) -> float:
        factor = float(np.exp(log_factor))
        found = [
            compute_losses(scale_logits(fit, factor), spread, samples)
            for fit, samples in zip(fits, validations, strict=True)
        ]
        return float(np.concatenate(found).mean())

    largest = max(float(fit.bias.abs().max()) for fit in fits)
    end = float(np.log(MAX_LOGIT / largest)) if largest > 0 else 0.0
    best = minimize_scalar(
        loss, bounds=(end - LOG_FACTOR_RANGE, end), method="bounded", options={"xatol": 0.05}
    )
    return float(np.exp(best.x))
