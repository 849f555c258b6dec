"""Eigendecomposition of symmetric matrices of any rank, by whichever LAPACK driver converges."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.float64]

DRIVERS = ("evd", "evr", "ev")
"""LAPACK's drivers in the order of trying; divide and conquer is the fastest, and fails on some matrices."""


def decompose_symmetric(matrix: npt.NDArray[Any]) -> tuple[Array, Array]:
    """Return eigenvalues, ascending, and eigenvectors, in columns.

    Rows and columns of zeros are left out of the decomposition: each has the eigenvalue zero and its own unit
    vector. Drivers fail on low-rank matrices with many of them (https://github.com/pytorch/pytorch/issues/145801).

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
    kept = np.flatnonzero(matrix.any(axis=0))
    if len(kept) < len(matrix):
        return _with_zeros(matrix, kept)
    if not len(matrix):
        return np.zeros(0), np.zeros((0, 0))
    return _by_any_driver(matrix)


def _with_zeros(matrix: Array, kept: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """Decompose a matrix of which only some rows and columns hold anything."""
    zero = np.setdiff1d(np.arange(len(matrix)), kept)
    part, inner = decompose_symmetric(matrix[np.ix_(kept, kept)])
    values = np.concatenate([np.zeros(len(zero)), part])
    vectors = np.zeros_like(matrix)
    vectors[zero, np.arange(len(zero))] = 1
    vectors[kept, len(zero) :] = inner
    order = np.argsort(values, kind="stable")
    return values[order], vectors[:, order]


def _by_any_driver(matrix: Array) -> tuple[Array, Array]:
    """Try one driver after the other; a result that is not finite counts as a failure too."""
    for driver in DRIVERS:
        try:
            values, vectors = scipy.linalg.eigh(matrix, driver=driver, check_finite=False)
        except (np.linalg.LinAlgError, ValueError):
            continue
        if np.isfinite(values).all() and np.isfinite(vectors).all():
            return values, vectors
    raise np.linalg.LinAlgError("the eigendecomposition does not converge")
