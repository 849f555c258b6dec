"""Sufficient statistics of features, computed block by block."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from sfm.stats_store.class_moments import ClassMoments, make_empty_moments, merge_moments


def compute_moments(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int32], class_count: int
) -> ClassMoments:
    """Compute the moments of a block of samples in two passes over it, in float64.

    Parameters
    ----------
    features : ndarray, shape (n, D)
    labels : ndarray, shape (n,)
        Class of each sample, in ``range(classes)``.
    class_count : int
    """
    order = np.argsort(labels, kind="stable")
    rows = features[order].astype(np.float64)
    count = np.bincount(labels, minlength=class_count)
    present = np.flatnonzero(count)
    starts = (np.cumsum(count) - count)[present]
    result = make_empty_moments(class_count, features.shape[1])
    if len(present):
        result.count[:] = count
        result.mean[present] = np.add.reduceat(rows, starts, axis=0) / count[present, None]
        rows -= np.repeat(result.mean[present], count[present], axis=0)
        result.within_scatter[:] = rows.T @ rows
        result.scatter_diagonal[present] = np.add.reduceat(np.square(rows, out=rows), starts, axis=0)
    return result


def accumulate_moments(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]],
    class_count: int,
    feature_count: int,
) -> ClassMoments:
    """Merge the moments of blocks of (features, labels), in their order."""
    total = make_empty_moments(class_count, feature_count)
    for rows, labels in blocks:
        total = merge_moments(total, compute_moments(rows, labels, class_count))
    return total
