"""Bilinear resampling as sums over a few rows: fast, differentiable, and deterministic on every device.

A bilinear resampling of one axis is a matrix with two entries per row. On a CPU, ``embedding_bag`` multiplies
by it without touching its zeros; the way back multiplies by the transpose in the same manner, so that nothing
is scattered, as ``grid_sample`` and ``interpolate`` do in an order that varies on CUDA. A GPU has the zeros
multiplied sooner than a CPU has made the lists of the others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfm.backbones import views
from sfm.backbones.crops import Crops


@dataclass(frozen=True)
class Resampling:
    """A sparse matrix with the same number of entries in every row, and its transpose.

    Attributes
    ----------
    columns, weights : Tensor, shape (rows, taps), int32 and float32
        The entries of each row.
    back_rows, back_weights : Tensor, shape (rows * taps,), int32 and float32
        The entries of the transpose, row after row.
    back_starts : Tensor, shape (columns,), int32
        Where each row of the transpose begins.
    """

    columns: Tensor
    weights: Tensor
    back_rows: Tensor
    back_weights: Tensor
    back_starts: Tensor


def resampling(
    columns: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], width: int, device: torch.device
) -> Resampling:
    """Build a resampling from its entries.

    Parameters
    ----------
    columns, weights : ndarray, shape (rows, taps)
        Which rows of a table make up each resampled row, and how much of them.
    width : int
        Rows of the table.
    device : torch.device
    """
    flat, shares = columns.ravel(), weights.astype(np.float32)
    order = np.argsort(flat, kind="stable")
    starts = np.zeros(width, dtype=np.int64)
    np.cumsum(np.bincount(flat, minlength=width)[:-1], out=starts[1:])
    places = (place.astype(np.int32) for place in (columns, order // columns.shape[1], starts))
    forth, back, begin = places
    arrays = (forth, shares, back, shares.ravel()[order], begin)
    return Resampling(*(torch.from_numpy(array).to(device) for array in arrays))


def sums(table: Tensor, matrix: Resampling) -> Tensor:
    """Multiply a table, shape (columns, width), by a matrix; without a gradient, see :func:`resample`."""
    weights = matrix.weights.to(table.dtype)
    return F.embedding_bag(matrix.columns, table, mode="sum", per_sample_weights=weights)


def sums_back(table: Tensor, matrix: Resampling) -> Tensor:
    """Multiply a table, shape (rows, width), by the transpose of a matrix; without a gradient."""
    weights = matrix.back_weights.to(table.dtype)
    return F.embedding_bag(
        matrix.back_rows, table, matrix.back_starts, mode="sum", per_sample_weights=weights
    )


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: Resampling) -> Tensor:
        ctx.matrix = matrix
        return sums(table, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sums_back(gradient.contiguous(), ctx.matrix), None


def resample(table: Tensor, matrix: Resampling) -> Tensor:
    """Resample the rows of a table.

    Parameters
    ----------
    table : Tensor, shape (columns, width)
        Contiguous; differentiable (once).
    matrix : Resampling

    Returns
    -------
    Tensor, shape (rows, width)
    """
    result: Tensor = _Resample.apply(table, matrix)
    return result


def taps(
    start: npt.NDArray[np.float64],
    length: npt.NDArray[np.float64],
    size: int,
    out: int,
    mirror: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Say which two pixels each bilinearly resampled pixel is made of (half-pixel centres, edges held).

    Parameters
    ----------
    start, length : ndarray, shape (n,)
        Intervals of an axis, in pixels.
    size, out : int
        Length of the axis before and after, in pixels.
    mirror : ndarray of bool, shape (n,), optional
        Which results run backwards.

    Returns
    -------
    pixels : ndarray of int64, shape (n, out, 2)
    weights : ndarray of float64, shape (n, out, 2)
        Not negative; the two of a pixel sum to one.
    """
    at = start[:, None] + length[:, None] * ((np.arange(out) + 0.5) / out) - 0.5
    if mirror is not None:
        at = np.where(mirror[:, None], at[:, ::-1], at)
    at = np.clip(at, 0, size - 1)
    low = at.astype(np.int64)
    share = at - low
    return np.stack([low, np.minimum(low + 1, size - 1)], axis=-1), np.stack([1 - share, share], axis=-1)


def look(images: Tensor, crops: Crops, out: int) -> Tensor:
    """Look at images through crops, as :func:`sfm.backbones.views.apply_crops`, through several each.

    Parameters
    ----------
    images : Tensor, shape (n, channel, size, size)
        Square images; differentiable.
    crops : Crops
        Of n * views boxes: those of the first image, then those of the second, ...
    out : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (n * views, channel, out, out)
    """
    size, each = images.shape[-1], len(crops.top) // len(images)
    if images.device.type == "cuda":
        return views.apply_crops(images if each == 1 else images.repeat_interleave(each, 0), crops, out)
    cut = _resampled_rows(images, each, *taps(crops.top, crops.height, size, out))
    return _resampled_rows(cut.mT, 1, *taps(crops.left, crops.width, size, out, crops.flip)).mT


def _resampled_rows(
    images: Tensor, each: int, pixels: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]
) -> Tensor:
    """Resample the second last axis of images (n, channel, size, width), `each` times every image."""
    count, channels, size, width = images.shape
    looks, out, _ = pixels.shape
    plane = (np.arange(looks) // each)[:, None] * channels + np.arange(channels)
    columns = plane[:, :, None, None] * size + pixels[:, None]
    entries = np.broadcast_to(weights[:, None], columns.shape)
    matrix = resampling(
        columns.reshape(-1, 2), entries.reshape(-1, 2), count * channels * size, images.device
    )
    return resample(images.reshape(-1, width), matrix).view(looks, channels, out, width)
