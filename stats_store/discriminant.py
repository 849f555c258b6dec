"""A linear classifier in closed form, from class means and the pooled within-class scatter alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.stats_store.class_moments import ClassMoments, Float64Array

ABSENT_CLASS_BIAS = -1e6
"""Bias of a class without training samples."""


@dataclass(frozen=True)
class LinearDiscriminant:
    """A linear classifier of raw features: ``logits = feature @ weight.T + bias``.

    Attributes
    ----------
    weight : ndarray of float32, shape (C, D)
    bias : ndarray of float32, shape (C,)
    shrinkage : float
        Weight of the multiple of the identity in the covariance that was inverted, in [0, 1].
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    shrinkage: float


def fit_linear_discriminant(moments: ClassMoments) -> LinearDiscriminant:
    """Fit a linear discriminant: Gaussians with a common covariance, whose log posteriors are the logits.

    With S the within-class scatter, n samples and C classes, the covariance is
    ``Sigma = (1 - r) S / (n - C) + r t I``, t the mean of the diagonal of S / (n - C), and r the oracle
    approximating shrinkage (Chen, Wiesel, Eldar, Hero 2010, equation 23), which needs no samples either. Then
    ``w_c = Sigma^-1 (mu_c - mu)`` and ``b_c = log(n_c / n) - w_c . (mu_c + mu) / 2``, with mu the mean of all
    samples: the same posteriors as with mu = 0, without the loss of digits when features are far from zero.
    """
    count, classes, features = moments.count, len(moments.count), moments.mean.shape[1]
    is_present = count > 0
    degrees_of_freedom = int(count.sum()) - int(is_present.sum())
    covariance = moments.within_scatter / max(degrees_of_freedom, 1)
    scale = float(np.trace(covariance)) / features
    shrinkage = compute_oas_shrinkage(covariance, degrees_of_freedom)
    # Without any scatter, as with one sample per class, this becomes the nearest-mean classifier.
    shrunk_covariance = (1 - shrinkage) * covariance + (shrinkage * scale if scale > 0 else 1.0) * np.eye(
        features
    )
    overall_mean = count @ moments.mean / count.sum()
    weight, bias = np.zeros((classes, features)), np.full(classes, ABSENT_CLASS_BIAS)
    present_means = moments.mean[is_present]
    weight[is_present] = np.linalg.solve(shrunk_covariance, (present_means - overall_mean).T).T
    prior = np.log(count[is_present] / count.sum())
    bias[is_present] = prior - ((present_means + overall_mean) / 2 * weight[is_present]).sum(axis=1)
    return LinearDiscriminant(weight.astype(np.float32), bias.astype(np.float32), shrinkage)


def compute_oas_shrinkage(covariance: Float64Array, degrees_of_freedom: int) -> float:
    """Return the oracle approximating shrinkage of a sample covariance towards the identity, in [0, 1].

    Parameters
    ----------
    covariance : ndarray, shape (D, D)
    degrees_of_freedom : int
        Degrees of freedom of the estimate.
    """
    features = len(covariance)
    trace, squared_sum = float(np.trace(covariance)), float(np.square(covariance).sum())
    denominator = (degrees_of_freedom + 1 - 2 / features) * (squared_sum - trace**2 / features)
    return min(1.0, ((1 - 2 / features) * squared_sum + trace**2) / denominator) if denominator > 0 else 1.0
