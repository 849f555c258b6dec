"""Eigendecomposition of symmetric matrices of any rank, by whichever LAPACK driver converges."""

from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.stats_store.class_moments import Float64Array

LAPACK_DRIVERS = ("evd", "evr", "ev")
"""LAPACK drivers in the order they are tried: the first is the fastest, but fails on some matrices."""


def eigendecompose_symmetric(matrix: npt.NDArray[Any]) -> tuple[Float64Array, Float64Array]:
    """Return the eigenvalues of a symmetric matrix, ascending, and its eigenvectors in columns.

    Rows and columns of zeros are left out of the decomposition: each has the eigenvalue zero and its own unit
    vector. Drivers fail on low-rank matrices with many of them
    (https://github.com/pytorch/pytorch/issues/145801).

    Parameters
    ----------
    matrix : ndarray, shape (n, n)
        Finite and symmetric; the lower triangle counts.

    Raises
    ------
    numpy.linalg.LinAlgError
        If no driver converges.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    nonzero_rows = np.flatnonzero(matrix.any(axis=0))
    if len(nonzero_rows) < len(matrix):
        return _eigendecompose_without_zero_rows(matrix, nonzero_rows)
    if not len(matrix):
        return np.zeros(0), np.zeros((0, 0))
    return _eigendecompose_with_driver_fallback(matrix)


def _eigendecompose_without_zero_rows(
    matrix: Float64Array, nonzero_row_indices: npt.NDArray[np.intp]
) -> tuple[Float64Array, Float64Array]:
    """Decompose a matrix whose rows and columns are zero except for `nonzero_row_indices`."""
    zero_rows = np.setdiff1d(np.arange(len(matrix)), nonzero_row_indices)
    nonzero_values, nonzero_vectors = eigendecompose_symmetric(
        matrix[np.ix_(nonzero_row_indices, nonzero_row_indices)]
    )
    values = np.concatenate([np.zeros(len(zero_rows)), nonzero_values])
    vectors = np.zeros_like(matrix)
    vectors[zero_rows, np.arange(len(zero_rows))] = 1
    vectors[nonzero_row_indices, len(zero_rows) :] = nonzero_vectors
    order = np.argsort(values, kind="stable")
    return values[order], vectors[:, order]


def _eigendecompose_with_driver_fallback(matrix: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Decompose a matrix with the first driver that converges to finite values."""
    from scipy.linalg import eigh  # slow to import

    for driver in LAPACK_DRIVERS:
        try:
            values, vectors = eigh(matrix, driver=driver, check_finite=False)
        except (np.linalg.LinAlgError, ValueError):
            continue
        if np.isfinite(values).all() and np.isfinite(vectors).all():
            return values, vectors
    raise np.linalg.LinAlgError("the eigendecomposition does not converge")
