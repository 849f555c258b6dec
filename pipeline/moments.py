"""Sufficient statistics of features: per-class counts and means, and scatters around them.

Scatters of disjoint parts add exactly, S = S_A + S_B + sum_c n_A n_B / n delta delta^T, with delta the
difference of the class means. Unlike sums of squares, this is stable (Chan, Golub, LeVeque 1979).
"""

from collections.abc import Iterable
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


def moments_of(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int32], classes: int) -> Moments:
    """Compute the moments of a block of samples in two passes over it, in float64.

    Parameters
    ----------
    features : ndarray, shape (n, D)
    labels : ndarray, shape (n,)
        Class of each sample, in ``range(classes)``.
    classes : int
    """
    order = np.argsort(labels, kind="stable")
    rows = features[order].astype(np.float64)
    count = np.bincount(labels, minlength=classes)
    present = np.flatnonzero(count)
    starts = (np.cumsum(count) - count)[present]
    result = no_moments(classes, features.shape[1])
    if len(present):
        result.count[:] = count
        result.mean[present] = np.add.reduceat(rows, starts, axis=0) / count[present, None]
        rows -= np.repeat(result.mean[present], count[present], axis=0)
        result.within_scatter[:] = rows.T @ rows
        result.scatter_diagonal[present] = np.add.reduceat(np.square(rows, out=rows), starts, axis=0)
    return result


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets of samples."""
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


def accumulate(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]], classes: int, features: int
) -> Moments:
    """Merge the moments of blocks of (features, labels), in their order."""
    total = no_moments(classes, features)
    for rows, labels in blocks:
        total = merge(total, moments_of(rows, labels, classes))
    return total
