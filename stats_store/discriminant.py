"""A linear classifier in closed form, from class means and the pooled within-class scatter alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.stats_store.moments import Array, Moments

NEVER = -1e6
"""Bias of a class without training samples."""


@dataclass(frozen=True)
class Discriminant:
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


def linear_discriminant(moments: Moments) -> Discriminant:
    """Fit Gaussians of one common covariance to the classes; the logits are their log posteriors.

    With S the within-class scatter, n samples and C classes, the covariance is
    ``Sigma = (1 - r) S / (n - C) + r t I``, t the mean of the diagonal of S / (n - C), and r the oracle
    approximating shrinkage (Chen, Wiesel, Eldar, Hero 2010, equation 23), which needs no samples either. Then
    ``w_c = Sigma^-1 (mu_c - mu)`` and ``b_c = log(n_c / n) - w_c . (mu_c + mu) / 2``, with mu the mean of all
    samples: the same posteriors as with mu = 0, without the loss of digits when features are far from zero.
    """
    count, classes, features = moments.count, len(moments.count), moments.mean.shape[1]
    present = count > 0
    freedom = int(count.sum()) - int(present.sum())
    covariance = moments.within_scatter / max(freedom, 1)
    scale = float(np.trace(covariance)) / features
    shrinkage = oracle_approximating_shrinkage(covariance, freedom)
    # No spread at all, as with one sample per class: the nearest mean.
    sigma = (1 - shrinkage) * covariance + (shrinkage * scale if scale > 0 else 1.0) * np.eye(features)
    centre = count @ moments.mean / count.sum()
    weight, bias = np.zeros((classes, features)), np.full(classes, NEVER)
    means = moments.mean[present]
    weight[present] = np.linalg.solve(sigma, (means - centre).T).T
    prior = np.log(count[present] / count.sum())
    bias[present] = prior - ((means + centre) / 2 * weight[present]).sum(axis=1)
    return Discriminant(weight.astype(np.float32), bias.astype(np.float32), shrinkage)


def oracle_approximating_shrinkage(covariance: Array, freedom: int) -> float:
    """Return how much of a multiple of the identity a sample covariance needs, in [0, 1].

    Parameters
    ----------
    covariance : ndarray, shape (D, D)
    freedom : int
        Degrees of freedom it was estimated with.
    """
    p = len(covariance)
    trace, square = float(np.trace(covariance)), float(np.square(covariance).sum())
    spread = (freedom + 1 - 2 / p) * (square - trace**2 / p)
    return min(1.0, ((1 - 2 / p) * square + trace**2) / spread) if spread > 0 else 1.0
