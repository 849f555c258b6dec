"""The nearest class mean as a linear classifier, which of few samples the trained one may stay close to."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from sfm.pipeline.equipment import single_threaded
from sfm.pipeline.logistic import Fit, Spread, cross_entropies, on_raw_features
from sfm.pipeline.staging import Staged

MOST_LOGIT = 20.0
"""The factor of the logits makes the largest bias no larger: beyond that, all probabilities are 0 or 1."""

LOG_RANGE = 16.0
"""Natural logarithm of the largest factor over the least."""


def class_mean_fit(rows: Iterable[tuple[Tensor, Tensor]], classes: int, features: int) -> Fit:
    """Write "the class whose mean is nearest" as a classifier of standardised features.

    ``|x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2)``, so the nearest mean has the largest ``x.m - |m|^2 / 2``.

    Parameters
    ----------
    rows : iterable of (features, labels)
        Standardised; see ``standardised``.
    """
    total = torch.zeros(classes, features, dtype=torch.float64)
    count = torch.zeros(classes, dtype=torch.float64)
    with single_threaded():
        for x, y in rows:
            members = torch.nn.functional.one_hot(y, classes).double()
            total += (members.T @ x.double()).cpu()
            count += members.sum(dim=0).cpu()
    mean = total / count.clamp(min=1)[:, None]
    return Fit(mean, -mean.square().sum(dim=1) / 2, 0, False)


def scale_logits(fit: Fit, factor: float) -> Fit:
    """Return a classifier with all logits multiplied."""
    return Fit(fit.weight * factor, fit.bias * factor, fit.iterations, fit.converged)


def losses_on(fit: Fit, spread: Spread, samples: Staged) -> npt.NDArray[np.float64]:
    """Return the cross-entropy on every raw sample, of a classifier of standardised features."""
    weight, bias = on_raw_features(fit.weight, fit.bias, spread)
    return cross_entropies(samples, weight.float().numpy(), bias.float().numpy())


def calibrate(fits: Sequence[Fit], validations: Sequence[Staged], spread: Spread) -> float:
    """Return the factor of the logits of all fits with the least cross-entropy, each on its own samples."""

    def loss(log_factor: float) -> float:
        factor = float(np.exp(log_factor))
        found = [
            losses_on(scale_logits(fit, factor), spread, samples)
            for fit, samples in zip(fits, validations, strict=True)
        ]
        return float(np.concatenate(found).mean())

    largest = max(float(fit.bias.abs().max()) for fit in fits)
    end = float(np.log(MOST_LOGIT / largest)) if largest > 0 else 0.0
    best = minimize_scalar(loss, bounds=(end - LOG_RANGE, end), method="bounded", options={"xatol": 0.05})
    return float(np.exp(best.x))
