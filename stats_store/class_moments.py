"""Class moments of features, and the moments of a union of disjoint sets of samples.

Scatters of disjoint sets add exactly, S = S_A + S_B + sum_c n_A n_B / n delta delta^T, with delta the
difference of the class means. Unlike sums of squares, this is stable (Chan, Golub, LeVeque 1979).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClassMoments:
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
    mean: Float64Array
    scatter_diagonal: Float64Array
    within_scatter: Float64Array


def make_empty_moments(class_count: int, feature_count: int) -> ClassMoments:
    """Return the moments of zero samples: the neutral element of :func:`merge_moments`."""
    return ClassMoments(
        np.zeros(class_count, dtype=np.int64),
        np.zeros((class_count, feature_count)),
        np.zeros((class_count, feature_count)),
        np.zeros((feature_count, feature_count)),
    )


def merge_moments(first: ClassMoments, second: ClassMoments) -> ClassMoments:
    """Return the moments of the union of two disjoint sets of samples of the same classes."""
    count = first.count + second.count
    second_share = np.divide(second.count, count, out=np.zeros(len(count)), where=count > 0)[:, None]
    delta = second.mean - first.mean
    mean = first.mean + second_share * delta
    weight = first.count[:, None] * second_share
    return ClassMoments(
        count,
        mean,
        first.scatter_diagonal + second.scatter_diagonal + weight * delta**2,
        first.within_scatter + second.within_scatter + delta.T @ (weight * delta),
    )


def expand_moments_to_class_union(
    moments: ClassMoments, positions_in_union: npt.NDArray[np.intp], union_class_count: int
) -> ClassMoments:
    """Return moments with their classes at other positions among a larger number of classes.

    Parameters
    ----------
    positions_in_union : ndarray of int, shape (C,)
        New position of each class, in ``range(union_class_count)``.
    union_class_count : int
        Number of classes of the result.
    """
    expanded = make_empty_moments(union_class_count, moments.mean.shape[1])
    expanded.count[positions_in_union] = moments.count
    expanded.mean[positions_in_union] = moments.mean
    expanded.scatter_diagonal[positions_in_union] = moments.scatter_diagonal
    return ClassMoments(expanded.count, expanded.mean, expanded.scatter_diagonal, moments.within_scatter)
