"""Eigendecompositions that always come: matrices of low rank, with rows of zeros, of zeros alone."""

import numpy as np
import pytest
import scipy.linalg

from sfm.stats_store.eigen import eigendecompose_symmetric


def make_matrices():
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((30, 20))
    narrow = rng.standard_normal((3, 20))
    sparse = np.zeros((20, 20))
    sparse[np.ix_([3, 4, 9], [3, 4, 9])] = [[2, 1, 0], [1, 2, 0], [0, 0, -3]]
    return {
        "full rank": whole.T @ whole,
        "low rank": narrow.T @ narrow,
        "rows of zeros": sparse,
        "zero": np.zeros((5, 5)),
        "one by one": np.full((1, 1), 4.0),
        "empty": np.zeros((0, 0)),
        "tiny": 1e-300 * (whole.T @ whole),
    }


@pytest.mark.parametrize("kind", make_matrices())
def test_eigenvectors_are_orthonormal_and_reconstruct_the_matrix(kind):
    matrix = make_matrices()[kind]
    values, vectors = eigendecompose_symmetric(matrix)
    scale = np.abs(matrix).max(initial=0.0) or 1.0
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(matrix)), atol=1e-10)
    np.testing.assert_allclose((vectors * (values / scale)) @ vectors.T, matrix / scale, atol=1e-9)


def test_eigendecomposition_falls_back_to_the_next_lapack_driver(monkeypatch):
    tried, eigh = [], scipy.linalg.eigh

    def picky(matrix, *, driver, **options):
        tried.append(driver)
        if driver == "evd":
            raise np.linalg.LinAlgError("does not converge")
        values, vectors = eigh(matrix, driver=driver, **options)
        return (values * np.nan if driver == "evr" else values), vectors

    monkeypatch.setattr(scipy.linalg, "eigh", picky)
    values, _ = eigendecompose_symmetric(np.diag([1.0, 2.0]))
    assert values.tolist() == [1.0, 2.0]
    assert tried == ["evd", "evr", "ev"]


def test_eigendecomposition_of_a_non_finite_matrix_raises_lin_alg_error():
    with pytest.raises(np.linalg.LinAlgError):
        eigendecompose_symmetric(np.array([[1.0, np.nan], [np.nan, 1.0]]))
