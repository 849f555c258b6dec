"""Bilinear resampling by sparse matrices: differentiable, and deterministic on every device.

A bilinear resampling of one axis is a matrix with two entries per row. On a CPU, ``embedding_bag`` multiplies
by it without touching its zeros. Backward multiplies by the transpose in the same way, so that nothing is
scattered, as ``grid_sample`` and ``interpolate`` do in an order that varies on CUDA. A GPU uses dense
matrices: it multiplies the zeros in less time than the CPU takes to list the other entries. Measured
with lite0 (``python benchmarks/execution.py``): 17 % of a step at 224 px and 3 % at 96 px.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.crops import Crops
from sfm.backbones.views import apply_crops


@dataclass(frozen=True)
class SparseMatrix:
    """A sparse matrix with the same number of entries in every row, and its transpose.

    Attributes
    ----------
    columns, weights : Tensor, shape (rows, taps), int32 and float32
        The entries of each row.
    transposed_columns, transposed_weights : Tensor, shape (rows * taps,), int32 and float32
        The entries of the transpose, row after row.
    transposed_starts : Tensor, shape (columns,), int32
        Where each row of the transpose begins.
    """

    columns: Tensor
    weights: Tensor
    transposed_columns: Tensor
    transposed_weights: Tensor
    transposed_row_starts: Tensor


def make_sparse_matrix(
    tap_columns: npt.NDArray[np.int64],
    tap_weights: npt.NDArray[np.float64],
    column_count: int,
    device: torch.device,
) -> SparseMatrix:
    """Return a sparse matrix and its transpose, from the entries of its rows.

    Parameters
    ----------
    tap_columns, tap_weights : ndarray, shape (rows, taps)
        Columns and values of the entries of each row.
    column_count : int
        Number of columns.
    device : torch.device
    """
    flat_columns, values = tap_columns.ravel(), tap_weights.astype(np.float32)
    order = np.argsort(flat_columns, kind="stable")
    starts = np.zeros(column_count, dtype=np.int64)
    np.cumsum(np.bincount(flat_columns, minlength=column_count)[:-1], out=starts[1:])
    indices = (each.astype(np.int32) for each in (tap_columns, order // tap_columns.shape[1], starts))
    row_columns, transposed_columns, transposed_row_starts = indices
    arrays = (row_columns, values, transposed_columns, values.ravel()[order], transposed_row_starts)
    return SparseMatrix(*(torch.from_numpy(array).to(device) for array in arrays))


def multiply_sparse_without_autograd(dense: Tensor, matrix: SparseMatrix) -> Tensor:
    """Multiply a matrix by a table, shape (columns, width), without autograd: see :func:`resample_rows`."""
    weights = matrix.weights.to(dense.dtype)
    return F.embedding_bag(matrix.columns, dense, mode="sum", per_sample_weights=weights)


def multiply_transposed_without_autograd(dense: Tensor, matrix: SparseMatrix) -> Tensor:
    """Multiply the transpose of a matrix by a table, shape (rows, width), without autograd."""
    weights = matrix.transposed_weights.to(dense.dtype)
    return F.embedding_bag(
        matrix.transposed_columns, dense, matrix.transposed_row_starts, mode="sum", per_sample_weights=weights
    )


class _ResampleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        return multiply_sparse_without_autograd(dense, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return multiply_transposed_without_autograd(gradient.contiguous(), ctx.matrix), None


def resample_rows(dense: Tensor, matrix: SparseMatrix) -> Tensor:
    """Multiply a matrix by a table, with autograd.

    Parameters
    ----------
    dense : Tensor, shape (columns, width)
        Contiguous; differentiable (once).
    matrix : SparseMatrix

    Returns
    -------
    Tensor, shape (rows, width)
    """
    result: Tensor = _ResampleRows.apply(dense, matrix)
    return result


def compute_bilinear_taps(
    starts: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.float64],
    input_pixels: int,
    output_pixels: int,
    is_mirrored: npt.NDArray[np.bool_] | None = None,
    edge: CropEdge = "clip",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return two pixels and weights per bilinearly resampled pixel (half-pixel centres).

    Parameters
    ----------
    starts, lengths : ndarray, shape (n,)
        Intervals of an axis, in pixels.
    input_pixels, output_pixels : int
        Length of the axis before and after, in pixels.
    is_mirrored : ndarray of bool, shape (n,), optional
        Which intervals are mirrored.
    edge : {"clip", "zero"}
        What lies outside of the axis: its edge pixels repeated, or zeros.

    Returns
    -------
    pixels : ndarray of int64, shape (n, out, 2)
    weights : ndarray of float64, shape (n, out, 2)
        Not negative; the two weights of a pixel sum to one, to less at zeros.
    """
    positions = starts[:, None] + lengths[:, None] * ((np.arange(output_pixels) + 0.5) / output_pixels) - 0.5
    if is_mirrored is not None:
        positions = np.where(is_mirrored[:, None], positions[:, ::-1], positions)
    if edge == "zero":
        pixels = np.floor(positions).astype(np.int64)[..., None] + np.arange(2)
        weights = np.maximum(1 - abs(positions[..., None] - pixels), 0)
        is_outside = (pixels < 0) | (pixels >= input_pixels)
        return np.clip(pixels, 0, input_pixels - 1), np.where(is_outside, 0, weights)
    positions = np.clip(positions, 0, input_pixels - 1)
    lower = positions.astype(np.int64)
    fraction = positions - lower
    pixels = np.stack([lower, np.minimum(lower + 1, input_pixels - 1)], axis=-1)
    return pixels, np.stack([1 - fraction, fraction], axis=-1)


def apply_several_crops_per_image(images: Tensor, crops: Crops, output_pixels: int) -> Tensor:
    """Cut crops out of images and resize them, several per image.

    Parameters
    ----------
    images : Tensor, shape (n, channel, size, size)
        Square images; differentiable.
    crops : Crops
        Of n * views boxes: those of the first image, then those of the second, ...
    output_pixels : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (n * views, channel, out, out)
    """
    size, views = images.shape[-1], len(crops.top) // len(images)
    if images.device.type == "cuda":
        return apply_crops(images if views == 1 else images.repeat_interleave(views, 0), crops, output_pixels)
    cut = _resample_height(
        images,
        views,
        *compute_bilinear_taps(crops.top, crops.height, size, output_pixels, edge=crops.edge),
    )
    return _resample_height(
        cut.mT,
        1,
        *compute_bilinear_taps(crops.left, crops.width, size, output_pixels, crops.flip, crops.edge),
    ).mT


def _resample_height(
    images: Tensor,
    views_per_image: int,
    tap_rows: npt.NDArray[np.int64],
    tap_weights: npt.NDArray[np.float64],
) -> Tensor:
    """Resample the second last axis of images (n, channel, size, width), several times every image."""
    count, channels, size, width = images.shape
    view_count, out, _ = tap_rows.shape
    plane = (np.arange(view_count) // views_per_image)[:, None] * channels + np.arange(channels)
    columns = plane[:, :, None, None] * size + tap_rows[:, None]
    entries = np.broadcast_to(tap_weights[:, None], columns.shape)
    matrix = make_sparse_matrix(
        columns.reshape(-1, 2), entries.reshape(-1, 2), count * channels * size, images.device
    )
    return resample_rows(images.reshape(-1, width), matrix).view(view_count, channels, out, width)
