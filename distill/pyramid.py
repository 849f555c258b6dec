"""Synthetic images as pyramids: levels of rising resolution that are upsampled and added up.

The coarse levels determine an image's layout before the fine ones exist. This keeps high-frequency noise, to
which a backbone would respond just as well, out of the images. Images as plain pixels are pyramids of one
level, the canvas.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfm.backbones.views import make_interpolation_matrices
from sfm.distill.resample import (
    SparseMatrix,
    compute_bilinear_taps,
    make_sparse_matrix,
    multiply_sparse_without_autograd,
    multiply_transposed_without_autograd,
)
from sfm.random_streams import make_rng

LEVEL_STREAM = 101
"""Key of the random streams of new levels."""

Parametrization = Literal["pyramid", "pixels"]
"""What an image is made of: levels of a pyramid, or its pixels alone."""

LevelStart = Literal["noise", "zeros"]
"""What levels start from: noise, or zeros and the image that is there."""

_DECORRELATION = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


def compute_canvas_size(input_size: int) -> int:
    """Return the side of a synthetic image, ``round(8/7 * input_size)`` pixels: room for crops to move in."""
    return round(8 / 7 * input_size)


def list_level_resolutions(
    canvas_pixels: int, parametrization: Parametrization = "pyramid"
) -> tuple[int, ...]:
    """Return the sides of the levels in pixels.

    Those of a pyramid are the powers of two below `canvas_pixels`, then `canvas_pixels`.
    """
    if parametrization == "pixels":
        return (canvas_pixels,)
    return (*(2**power for power in range((canvas_pixels - 1).bit_length())), canvas_pixels)


@cache
def make_decorrelated_to_rgb_matrix() -> Tensor:
    """Return the matrix from decorrelated colours to RGB, shape (3, 3): colours of natural images co-vary."""
    matrix = torch.tensor(_DECORRELATION)
    longest: Tensor = torch.linalg.vector_norm(matrix, dim=0).max()
    return matrix / longest


@cache
def _make_doubled_colour_matrix(
    device: torch.device, dtype: torch.dtype, color_decorrelation: bool
) -> Tensor:
    matrix = make_decorrelated_to_rgb_matrix() if color_decorrelation else torch.eye(3)
    return 2 * matrix.to(device, dtype)


@cache
def _make_width_upsampling_matrix(
    level_pixels: int, canvas_pixels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the matrix that upsamples the width of a level, multiplied from the right: (side, canvas)."""
    matrix = make_interpolation_matrices(
        np.zeros(1), np.full(1, float(level_pixels)), level_pixels, canvas_pixels
    )
    return matrix[0].T.to(device, dtype)


@lru_cache(maxsize=4)
def _make_sparse_height_upsampling_matrix(
    level_sides: tuple[int, ...], canvas_pixels: int, plane_count: int, device: torch.device
) -> SparseMatrix:
    """Return the sparse matrix that upsamples the height of levels and adds them up.

    Its columns are the rows of all levels of the first plane, then those of the second, ...: in backward,
    where a row of a coarse level is a sum of very many, every thread has its share.
    """
    offsets = np.cumsum((0, *level_sides))
    taps = [
        compute_bilinear_taps(np.zeros(1), np.full(1, float(side)), side, canvas_pixels)
        for side in level_sides
    ]
    columns = np.concatenate(
        [offset + pixels[0] for offset, (pixels, _) in zip(offsets, taps, strict=False)], axis=1
    )
    weights = np.concatenate([weights[0] for _, weights in taps], axis=1)
    first_columns = offsets[-1] * np.arange(plane_count)[:, None, None]
    return make_sparse_matrix(
        (first_columns + columns).reshape(plane_count * canvas_pixels, columns.shape[1]),
        np.tile(weights, (plane_count, 1)),
        plane_count * offsets[-1],
        device,
    )


@cache
def _make_dense_height_upsampling_matrix(
    level_sides: tuple[int, ...], canvas_pixels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the same matrix for one plane, dense, shape (canvas, rows of all levels)."""
    matrices = [
        make_interpolation_matrices(np.zeros(1), np.full(1, float(side)), side, canvas_pixels)[0]
        for side in level_sides
    ]
    return torch.cat(matrices, dim=1).to(device, dtype)


def upsample_rows(
    stacked_levels: Tensor, level_sides: tuple[int, ...], canvas_pixels: int, *, use_dense_matrices: bool
) -> Tensor:
    """Upsample the height of levels, and add them up; its gradient is :func:`upsample_rows_backward`.

    Parameters
    ----------
    stacked_levels : Tensor, shape (planes, sum of sides, canvas)
        The levels of each plane, already of the canvas's width, stacked on each other; contiguous.
    level_sides : tuple of int
        Of the levels.
    canvas_pixels : int
    use_dense_matrices : bool
        Use dense matrices, which are faster on a GPU.

    Returns
    -------
    Tensor, shape (planes, canvas, canvas)
        Contiguous.
    """
    planes, device = len(stacked_levels), stacked_levels.device
    if use_dense_matrices:
        matrix = _make_dense_height_upsampling_matrix(
            level_sides, canvas_pixels, device, stacked_levels.dtype
        )
        return torch.bmm(matrix.expand(planes, -1, -1), stacked_levels)
    sparse = _make_sparse_height_upsampling_matrix(level_sides, canvas_pixels, planes, device)
    return multiply_sparse_without_autograd(stacked_levels.view(-1, canvas_pixels), sparse).view(
        planes, canvas_pixels, canvas_pixels
    )


def upsample_rows_backward(
    gradient: Tensor, level_sides: tuple[int, ...], canvas_pixels: int, *, use_dense_matrices: bool
) -> Tensor:
    """Return the gradient of the input of :func:`upsample_rows` from that of its output.

    Parameters
    ----------
    gradient : Tensor, shape (planes, canvas, canvas)
        Contiguous.
    level_sides : tuple of int
    canvas_pixels : int
    use_dense_matrices : bool

    Returns
    -------
    Tensor, shape (planes, sum of sides, canvas)
    """
    planes, device = len(gradient), gradient.device
    if use_dense_matrices:
        matrix = _make_dense_height_upsampling_matrix(level_sides, canvas_pixels, device, gradient.dtype)
        return torch.bmm(matrix.T.expand(planes, -1, -1), gradient)
    sparse = _make_sparse_height_upsampling_matrix(level_sides, canvas_pixels, planes, device)
    return multiply_transposed_without_autograd(gradient.view(-1, canvas_pixels), sparse).view(
        planes, -1, canvas_pixels
    )


class _DecodePyramid(torch.autograd.Function):
    """Decode with a hand-written backward: autograd's overhead for many small levels exceeds their work.

    Measured with lite0 (``python benchmarks/execution.py``): 11 % of a step at 224 px, 2 % at 96 px.
    """

    @staticmethod
    def forward(ctx: Any, canvas_pixels: int, color_decorrelation: bool, *levels: Tensor) -> Tensor:
        count, device, dtype = len(levels[0]), levels[0].device, levels[0].dtype
        coarse = [level for level in levels if level.shape[-1] < canvas_pixels]
        sides = tuple(level.shape[-1] for level in coarse)
        dense = device.type == "cuda"
        if coarse:
            stacked = [
                (
                    level.reshape(-1, side)
                    @ _make_width_upsampling_matrix(side, canvas_pixels, device, dtype)
                ).view(-1, side, canvas_pixels)
                for level, side in zip(coarse, sides, strict=True)
            ]
            total = upsample_rows(
                torch.cat(stacked, dim=1), sides, canvas_pixels, use_dense_matrices=dense
            ).view(count, 3, -1)
            if len(coarse) < len(levels):
                total += levels[-1].flatten(2)
        else:
            total = levels[-1].flatten(2)
        colours = _make_doubled_colour_matrix(device, dtype, color_decorrelation).expand(count, -1, -1)
        images = torch.bmm(colours, total).sigmoid_().view(count, 3, canvas_pixels, canvas_pixels)
        ctx.save_for_backward(images)
        ctx.sides, ctx.colours, ctx.dense = sides, colours, dense
        ctx.has_finest = len(coarse) < len(levels)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        count, _, canvas_pixels, _ = images.shape
        grad_colours = torch.ops.aten.sigmoid_backward(gradient, images).reshape(count, 3, -1)
        total = torch.bmm(ctx.colours.mT, grad_colours)
        finest = [total.view(images.shape)] if ctx.has_finest else []
        if not ctx.sides:
            return None, None, *finest
        stacked = upsample_rows_backward(
            total.view(-1, canvas_pixels, canvas_pixels),
            ctx.sides,
            canvas_pixels,
            use_dense_matrices=ctx.dense,
        )
        matrix_options = canvas_pixels, images.device, images.dtype
        levels = [
            (rows.reshape(-1, canvas_pixels) @ _make_width_upsampling_matrix(side, *matrix_options).T).view(
                count, 3, side, side
            )
            for rows, side in zip(torch.split(stacked, ctx.sides, dim=1), ctx.sides, strict=True)
        ]
        return None, None, *levels, *finest


def decode_pyramid(levels: Sequence[Tensor], canvas_pixels: int, color_decorrelation: bool = True) -> Tensor:
    """Decode pyramids into images: ``sigmoid(2 * colour(sum of upsampled levels))``.

    Upsampling is bilinear with half-pixel centres, one axis after the other. The second axis is upsampled and
    summed over levels in one product, so that no single level is stored at full size.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        Coarse to fine, the last at most as large as the canvas; differentiable (once).
    canvas_pixels : int
        Side of the images, in pixels.
    color_decorrelation : bool
        Whether channels of levels are decorrelated colours, see :func:`make_decorrelated_to_rgb_matrix`;
        if not, they are red, green and blue.

    Returns
    -------
    Tensor, shape (N, 3, canvas, canvas)
        Values in [0, 1].
    """
    images: Tensor = _DecodePyramid.apply(canvas_pixels, color_decorrelation, *levels)
    return images


def append_noise_level_and_rescale(
    levels: Sequence[Tensor],
    level_pixels: int,
    total_image_count: int,
    seed: int,
    device: torch.device,
    own_image_rows: slice | None = None,
) -> list[Tensor]:
    """Return n levels from n-1: the new one is drawn from N(0, 1)/n, the others are scaled by (n-1)/n.

    So every level of an untrained pyramid has the same standard deviation, 1/n.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        May be empty: the first level is N(0, 1).
    level_pixels : int
        Side of the new level, in pixels.
    total_image_count : int
        Number of images of the run.
    seed : int
        Of the run. An image's new level depends on it, on n, and on the image's index only.
    device : torch.device
    own_image_rows : slice, optional
        Which of the images the levels are of; default: all.

    Returns
    -------
    list of Tensor
        New leaves that require gradients, float32.
    """
    n = len(levels) + 1
    noise = _draw_noise(
        make_rng(seed, LEVEL_STREAM, n), level_pixels, own_image_rows or slice(0, total_image_count)
    )
    scaled = [level.detach() * ((n - 1) / n) for level in levels]
    new_level = torch.from_numpy(noise).to(device) / n
    return [level.requires_grad_() for level in (*scaled, new_level)]


def append_level_of_zeros_or_image_and_rescale(
    levels: Sequence[Tensor], level_pixels: int, own_image_count: int, device: torch.device
) -> list[Tensor]:
    """Return n levels from n-1 without noise: the first is zeros, a later one hardly changes the images.

    The others are scaled by (n-1)/n, as in :func:`append_noise_level_and_rescale`, and the new one is the sum
    of the scaled ones over n-1, upsampled: levels add up to what they did before, but for the interpolation.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        May be empty.
    level_pixels : int
        Side of the new level, in pixels.
    own_image_count : int
        Number of images of this process, N.
    device : torch.device

    Returns
    -------
    list of Tensor
        New leaves that require gradients, float32.
    """
    n = len(levels) + 1
    scaled = [level.detach() * ((n - 1) / n) for level in levels]
    new_level = torch.zeros(own_image_count, 3, level_pixels, level_pixels, device=device)
    for level in scaled:
        width = _make_width_upsampling_matrix(level.shape[-1], level_pixels, device, level.dtype)
        new_level += width.T @ level @ width / (n - 1)
    return [level.requires_grad_() for level in (*scaled, new_level)]


def _draw_noise(
    rng: np.random.Generator, level_pixels: int, own_image_rows: slice
) -> npt.NDArray[np.float32]:
    """Draw the noise of all images up to the last of some rows; return that of these rows."""
    noise = np.empty(
        (own_image_rows.stop - own_image_rows.start, 3, level_pixels, level_pixels), dtype=np.float32
    )
    unused = np.empty_like(noise[0])
    for image in range(own_image_rows.stop):
        out = unused if image < own_image_rows.start else noise[image - own_image_rows.start]
        rng.standard_normal(dtype=np.float32, out=out)
    return noise
