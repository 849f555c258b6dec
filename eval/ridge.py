"""A linear projector in closed form: ridge regression, its penalty chosen by leaving groups out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sfm.eval.accuracy import Heads
from sfm.eval.inherit import Projectors
from sfm.stats_store.eigen import decompose_symmetric

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 4))
"""Penalties tried, in multiples of the mean eigenvalue of the scatter that is inverted."""


@dataclass(frozen=True)
class Ridge:
    """A fitted projector.

    Attributes
    ----------
    projectors : Projectors
        One.
    penalty : float
        The chosen multiple of the mean eigenvalue, one of ``PENALTIES``.
    """

    projectors: Projectors
    penalty: float


def fit_projector(features: Tensor, targets: Tensor, classifier: Heads) -> Ridge:
    """Fit ``y = W x + b`` by least squares with a penalty on W, none on b.

    The penalty is the one with which the logits of the inherited classifier come out best on groups that were
    left out of the fit: all views of one image, or one class. With one penalty the fitted values are
    ``H Y``, H a symmetric matrix, and what a fit without the group G would err on it is
    ``(I - H_GG)^-1 (Y - H Y)_G`` exactly, so no fit is repeated. The held-out split of the dataset takes no
    part.

    Parameters
    ----------
    features : Tensor, shape (group, sample, feature)
        Of the evaluation backbone; at least two groups.
    targets : Tensor, shape (group, sample, target feature)
        Of the distillation backbone, for the same samples.
    classifier : Heads
        One, of the target feature space.

    Returns
    -------
    Ridge
        Of the dtype of `features`; computed in float64.
    """
    groups, samples, _ = features.shape
    x, y = features.double().flatten(0, 1), targets.double().flatten(0, 1)
    centre, centre_y = x.mean(0), y.mean(0)
    x, y = x - centre, y - centre_y
    left, spectrum, right = decomposed(x)
    scale = float(spectrum.sum()) / x.shape[1]
    logits = y @ classifier.weight[0].double().T
    errors = [
        left_out_error(left, spectrum / (spectrum + penalty * scale), logits.view(groups, samples, -1))
        for penalty in PENALTIES
    ]
    penalty = PENALTIES[errors.index(min(errors))]
    gain = spectrum.sqrt() / (spectrum + penalty * scale)
    weight = (right * gain @ (left.T @ y)).T
    bias = centre_y - weight @ centre
    return Ridge(Projectors(weight[None].to(features), bias[None].to(features)), penalty)


def decomposed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix as ``U diag(sqrt(s)) V^T``, by way of the smaller of its two scatters.

    Returns
    -------
    tuple of Tensor
        U (sample, rank), s (rank,), V (feature, rank); directions of no extent are left out.
    """
    rows, columns = x.shape
    scatter = x @ x.T if rows < columns else x.T @ x
    # Not by torch, whose one driver does not converge on some matrices of low rank.
    spectrum, vectors = (
        torch.from_numpy(found).to(x) for found in decompose_symmetric(scatter.cpu().numpy())
    )
    kept = spectrum > spectrum[-1] * max(rows, columns) * torch.finfo(x.dtype).eps
    spectrum, vectors = spectrum[kept], vectors[:, kept]
    if rows < columns:
        return vectors, spectrum, x.T @ vectors / spectrum.sqrt()
    return x @ vectors / spectrum.sqrt(), spectrum, vectors


def left_out_error(left: Tensor, shrink: Tensor, wanted: Tensor) -> float:
    """Return the squared error on groups left out of a ridge regression with an intercept.

    Parameters
    ----------
    left : Tensor, shape (group * sample, rank)
        Left singular vectors of the centred regressors.
    shrink : Tensor, shape (rank,)
        ``s / (s + penalty)``.
    wanted : Tensor, shape (group, sample, output)
        Centred.
    """
    groups, samples, outputs = wanted.shape
    flat = wanted.reshape(groups * samples, outputs)
    residual = (flat - left * shrink @ (left.T @ flat)).view_as(wanted)
    own = left.view(groups, samples, -1)
    # The intercept adds the same number to every element of H.
    hat = (own * shrink) @ own.transpose(1, 2) + 1 / (groups * samples)
    error = torch.linalg.solve(torch.eye(samples).to(hat) - hat, residual)
    return float(error.square().sum())
