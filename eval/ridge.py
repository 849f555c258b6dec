"""Projectors in closed form: ridge regression, its penalty chosen by leave-one-group-out cross-validation."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sfm.eval.head_accuracy import SingleLinearHead
from sfm.eval.projectors import LinearProjectors, SingleLinearProjector
from sfm.stats_store.eigen import eigendecompose_symmetric

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 4))
"""Penalties tried, in multiples of the mean eigenvalue of the scatter that is inverted."""


@dataclass(frozen=True)
class RidgeFit:
    """A projector fitted by ridge regression.

    Attributes
    ----------
    projector : SingleLinearProjector
    relative_penalty : float
        The chosen multiple of the mean eigenvalue, one of ``PENALTIES``.
    """

    projector: SingleLinearProjector
    relative_penalty: float


def fit_ridge_projector(
    grouped_features: Tensor, grouped_target_features: Tensor, inherited_classifier: SingleLinearHead
) -> RidgeFit:
    """Fit ``y = W x + b`` by least squares with a penalty on W, none on b.

    The penalty is the one that predicts the logits of the inherited classifier best on groups that were left
    out of the fit: all views of one image, or one class. With one penalty the fitted values are
    ``H Y``, H a symmetric matrix, and the error on a group G of a fit without it
    is exactly ``(I - H_GG)^-1 (Y - H Y)_G``, so no fit is repeated. The held-out split of the dataset is not
    used.

    Parameters
    ----------
    grouped_features : Tensor, shape (group, sample, feature)
        Of the evaluation backbone; at least two groups.
    grouped_target_features : Tensor, shape (group, sample, target feature)
        Of the distillation backbone, for the same samples.
    inherited_classifier : SingleLinearHead
        Of the target feature space.

    Returns
    -------
    RidgeFit
        Of the dtype of `grouped_features`; computed in float64.
    """
    groups, samples, _ = grouped_features.shape
    x, y = grouped_features.double().flatten(0, 1), grouped_target_features.double().flatten(0, 1)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    left, spectrum, right = compute_compact_svd(x)
    scale = float(spectrum.sum()) / x.shape[1]
    logits = y @ inherited_classifier.weight[0].double().T
    errors = [
        compute_left_out_groups_squared_error(
            left, spectrum / (spectrum + penalty * scale), logits.view(groups, samples, -1)
        )
        for penalty in PENALTIES
    ]
    penalty = PENALTIES[errors.index(min(errors))]
    gain = spectrum.sqrt() / (spectrum + penalty * scale)
    weight = (right * gain @ (left.T @ y)).T
    bias = mean_y - weight @ mean_x
    return RidgeFit(
        LinearProjectors(weight[None].to(grouped_features), bias[None].to(grouped_features)), penalty
    )


class CompactSvd(NamedTuple):
    """A singular value decomposition without directions of zero variance.

    Attributes
    ----------
    left_vectors : Tensor, shape (sample, rank)
    squared_singular_values : Tensor, shape (rank,)
    right_vectors : Tensor, shape (feature, rank)
    """

    left_vectors: Tensor
    squared_singular_values: Tensor
    right_vectors: Tensor


def compute_compact_svd(matrix: Tensor) -> CompactSvd:
    """Return the singular value decomposition ``U diag(sqrt(s)) V^T``, computed from the smaller scatter."""
    rows, columns = matrix.shape
    scatter = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    # torch's only driver does not converge on some matrices of low rank.
    spectrum, vectors = (
        torch.from_numpy(array).to(matrix) for array in eigendecompose_symmetric(scatter.cpu().numpy())
    )
    is_nonzero = spectrum > spectrum[-1] * max(rows, columns) * torch.finfo(matrix.dtype).eps
    spectrum, vectors = spectrum[is_nonzero], vectors[:, is_nonzero]
    if rows < columns:
        return CompactSvd(vectors, spectrum, matrix.T @ vectors / spectrum.sqrt())
    return CompactSvd(matrix @ vectors / spectrum.sqrt(), spectrum, vectors)


def compute_left_out_groups_squared_error(
    left_singular_vectors: Tensor, shrinkage: Tensor, grouped_targets: Tensor
) -> float:
    """Return the squared error on left-out groups of a ridge regression with an intercept.

    Parameters
    ----------
    left_singular_vectors : Tensor, shape (group * sample, rank)
        Left singular vectors of the centred regressors.
    shrinkage : Tensor, shape (rank,)
        ``s / (s + penalty)``.
    grouped_targets : Tensor, shape (group, sample, output)
        Centred.
    """
    groups, samples, outputs = grouped_targets.shape
    flat = grouped_targets.reshape(groups * samples, outputs)
    residual = (flat - left_singular_vectors * shrinkage @ (left_singular_vectors.T @ flat)).view_as(
        grouped_targets
    )
    group_left = left_singular_vectors.view(groups, samples, -1)
    # The intercept adds the same number to every element of H.
    hat = (group_left * shrinkage) @ group_left.transpose(1, 2) + 1 / (groups * samples)
    error = torch.linalg.solve(torch.eye(samples).to(hat) - hat, residual)
    return float(error.square().sum())
