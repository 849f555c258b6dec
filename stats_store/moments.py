"""Sufficient statistics of features, and the moments of a union from those of its parts.

Scatters of disjoint parts add exactly, S = S_A + S_B + sum_c n_A n_B / n delta delta^T, with delta the
difference of the class means. Unlike sums of squares, this is stable (Chan, Golub, LeVeque 1979).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Class statistics of D-dimensional features of C classes, float64.

    Attributes
    ----------
    count : ndarray of int64, shape (C,)
    mean : ndarray, shape (C, D)
        Zero where a class has no sample.
    scatter_diagonal : ndarray, shape (C, D)
        Sum of squared deviations from the class mean, undivided.
    within_scatter : ndarray, shape (D, D)
        Sum over all samples of the outer product of their deviation from their class mean, undivided.
    """

    count: npt.NDArray[np.int64]
    mean: Array
    scatter_diagonal: Array
    within_scatter: Array


def no_moments(classes: int, features: int) -> Moments:
    """Return the moments of no samples, the neutral element of :func:`merge`."""
    return Moments(
        np.zeros(classes, dtype=np.int64),
        np.zeros((classes, features)),
        np.zeros((classes, features)),
        np.zeros((features, features)),
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets of samples of the same classes."""
    count = a.count + b.count
    share = np.divide(b.count, count, out=np.zeros(len(count)), where=count > 0)[:, None]
    delta = b.mean - a.mean
    mean = a.mean + share * delta
    weight = a.count[:, None] * share
    return Moments(
        count,
        mean,
        a.scatter_diagonal + b.scatter_diagonal + weight * delta**2,
        a.within_scatter + b.within_scatter + delta.T @ (weight * delta),
    )


def among(moments: Moments, position: npt.NDArray[np.intp], classes: int) -> Moments:
    """Return the same moments with the classes at other positions among more classes.

    Parameters
    ----------
    position : ndarray of int, shape (C,)
        Where each class goes, in ``range(classes)``.
    """
    wider = no_moments(classes, moments.mean.shape[1])
    wider.count[position] = moments.count
    wider.mean[position] = moments.mean
    wider.scatter_diagonal[position] = moments.scatter_diagonal
    return Moments(wider.count, wider.mean, wider.scatter_diagonal, moments.within_scatter)
