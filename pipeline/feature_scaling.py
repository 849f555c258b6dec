"""Standardised features: the scaling computed from moments, and rows in that scale."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.pipeline.runtime import find_blas_libraries
from sfm.pipeline.staged_features import StagedFeatures
from sfm.stats_store.class_moments import ClassMoments
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.stats_store.eigen import eigendecompose_symmetric

MAX_CACHED_BYTES = 3 * 2**29
"""Standardised rows are kept in memory up to this size; larger sets are read again in every pass."""

MAX_DOUBLE_PRECISION_ROWS = 4096
"""Up to this number of rows, use float64: with a strong penalty, float32 hides changes of the loss."""


FeaturesAndLabels = tuple[Tensor, Tensor]
"""A block of standardised features, shape (n, D), and their labels, int64 of shape (n,)."""


@dataclass(frozen=True)
class FeatureScaling:
    """Scaling that standardises features, and their variance after it; all float64.

    Attributes
    ----------
    mean, std : Tensor, shape (D,)
        Standardised features are ``(x - mean) / std``.
    axis_variances : Tensor, shape (r,)
        Variance of the standardised features along each principal axis.
    principal_axes : Tensor, shape (D, r)
        Principal axes of the standardised features, in columns; those of zero variance may be left out.
    common_scale : bool
        Whether all features are divided by the same number.
    """

    mean: Tensor
    std: Tensor
    axis_variances: Tensor
    principal_axes: Tensor
    common_scale: bool = False


def compute_feature_scaling(
    moments: ClassMoments, *, use_common_scale: bool = False, keep_constant_axes: bool = True
) -> FeatureScaling:
    """Return the scaling of features with given moments.

    Parameters
    ----------
    moments : ClassMoments
    use_common_scale : bool
        Divide all features by the root of their mean variance, not each by its own deviation. Deviations
        of few samples are noise.
    keep_constant_axes : bool
        Keep axes along which these samples have no variance; other samples (their views) may have some.
    """
    with find_blas_libraries().limit(limits=1):
        n = moments.count.sum()
        mean = moments.count @ moments.mean / n
        deviation = moments.mean - mean
        scatter = moments.within_scatter + (deviation * moments.count[:, None]).T @ deviation
        own_std = np.sqrt(np.diagonal(scatter) / n)
        varies = own_std > 1e-6 * own_std.max(initial=0.0)
        std = np.where(varies, own_std, 1.0)
        if use_common_scale and varies.any():
            std = np.full_like(own_std, np.sqrt(np.square(own_std).mean()))
        scatter = np.where(varies & varies[:, None], scatter / n / np.outer(std, std), 0.0)
        variance, axes = compute_variances_and_principal_axes(scatter)
        if not keep_constant_axes:
            nonzero = variance > 1e-10 * variance.max(initial=0.0)
            variance, axes = variance[nonzero], axes[:, nonzero]
        return FeatureScaling(
            mean=torch.from_numpy(mean),
            std=torch.from_numpy(std),
            axis_variances=torch.from_numpy(variance),
            principal_axes=torch.from_numpy(np.ascontiguousarray(axes)),
            common_scale=use_common_scale,
        )


def compute_variances_and_principal_axes(
    scatter: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return variances and axes of a scatter matrix; the coordinate axes if it cannot be decomposed.

    The axes only speed up the search: any orthonormal axes lead to the same classifier.
    """
    try:
        variance, axes = eigendecompose_symmetric(scatter)
    except np.linalg.LinAlgError:
        variance, axes = np.diagonal(scatter), np.eye(len(scatter))
    return np.maximum(variance, 0.0), axes


def convert_classifier_to_raw_features(
    weight: Tensor, bias: Tensor, scaling: FeatureScaling
) -> tuple[Tensor, Tensor]:
    """Convert a classifier of ``(x - mean) / std`` to one of ``x``."""
    raw_weight = weight / scaling.std
    return raw_weight, bias - raw_weight @ scaling.mean


@dataclass(frozen=True)
class StandardisedRows:
    """Standardised rows on a device, computed again from disk in every pass.

    Iterating yields (features, labels) of at most ``BLOCK_ROWS`` samples: `dtype` (n, D) and int64 (n,).
    """

    image_and_view_features: Sequence[StagedFeatures]
    scaling: FeatureScaling
    device: torch.device
    dtype: torch.dtype = torch.float32

    def __iter__(self) -> Iterator[FeaturesAndLabels]:
        mean, scale = (t.to(self.device, self.dtype) for t in (self.scaling.mean, 1 / self.scaling.std))
        for features, labels in chain.from_iterable(self.image_and_view_features):
            for start in range(0, len(labels), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                rows = torch.from_numpy(features[block]).to(self.device, self.dtype)
                yield (rows - mean).mul_(scale), torch.from_numpy(labels[block]).long().to(self.device)


def standardise_rows(
    image_and_view_features: Sequence[StagedFeatures],
    row_count: int,
    scaling: FeatureScaling,
    device: torch.device,
) -> Iterable[FeaturesAndLabels]:
    """Return standardised rows as a re-iterable, in memory if they fit."""
    dtype = torch.float64 if row_count <= MAX_DOUBLE_PRECISION_ROWS else torch.float32
    rows = StandardisedRows(image_and_view_features, scaling, device, dtype)
    max_bytes = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else MAX_CACHED_BYTES
    return list(rows) if 4 * row_count * len(scaling.mean) <= max_bytes else rows
