"""Synthetic images as pyramids: levels of rising resolution that are upsampled and added up.

The coarse levels settle an image's layout before the fine ones exist, which keeps high-frequency noise, to
which a backbone would respond just as well, out of the images.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sfm.backbones.views import interpolation_matrix, stream

LEVEL_NOISE = 101
"""Purpose of the random streams that levels start from."""

_DECORRELATION = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


def canvas_size(input_size: int) -> int:
    """Side of a synthetic image in pixels, ``round(8/7 * input_size)``: room for crops to move in."""
    return round(8 / 7 * input_size)


def resolutions(canvas: int) -> tuple[int, ...]:
    """Sides of the levels in pixels: powers of two below `canvas`, then `canvas` itself."""
    return (*(2**power for power in range((canvas - 1).bit_length())), canvas)


@cache
def colour_matrix() -> Tensor:
    """Matrix from decorrelated to red, green and blue, shape (3, 3): natural images' colours co-vary."""
    matrix = torch.tensor(_DECORRELATION)
    longest: Tensor = torch.linalg.vector_norm(matrix, dim=0).max()
    return matrix / longest


@cache
def _upsampling(resolution: int, canvas: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    whole = interpolation_matrix(np.zeros(1), np.full(1, float(resolution)), resolution, canvas)
    return whole[0].to(device, dtype)


def decode(levels: Sequence[Tensor], canvas: int) -> Tensor:
    """Turn pyramids into images: ``sigmoid(2 * colour(sum of upsampled levels))``.

    Upsampling is bilinear with half-pixel centres: a level L of side r adds ``U_r L U_r^T``. The sum over
    levels is taken inside one matrix product, ``[U_1 | U_2 | ...] [L_1 U_1^T; L_2 U_2^T; ...]``, so that no
    level is blown up to full size by itself.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        Coarse to fine, the first smaller than the canvas; differentiable.
    canvas : int
        Side of the images, in pixels.

    Returns
    -------
    Tensor, shape (N, 3, canvas, canvas)
        Values in [0, 1].
    """
    coarse = [level for level in levels if level.shape[-1] < canvas]
    up = [_upsampling(level.shape[-1], canvas, level.device, level.dtype) for level in coarse]
    widened = [level @ matrix.T for level, matrix in zip(coarse, up, strict=True)]
    total = torch.cat(up, dim=1) @ torch.cat(widened, dim=2)
    if len(coarse) < len(levels):
        total = total + levels[-1]
    colours = 2 * colour_matrix().to(total)
    return torch.sigmoid(colours @ total.flatten(2)).view(total.shape)


def grow(
    levels: Sequence[Tensor], resolution: int, count: int, seed: int, device: torch.device
) -> list[Tensor]:
    """Add a level: with it there are n, it is drawn from N(0, 1)/n and the others are scaled by (n-1)/n.

    So every level of an untrained pyramid has the same standard deviation, 1/n.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        May be empty: the first level is N(0, 1).
    resolution : int
        Side of the new level, in pixels.
    count : int
        Number of images, N.
    seed : int
        Of the run. The new level depends on it and on n alone.
    device : torch.device

    Returns
    -------
    list of Tensor
        New leaves that require gradients, float32.
    """
    n = len(levels) + 1
    rng = stream(seed, LEVEL_NOISE, n)
    noise = rng.standard_normal((count, 3, resolution, resolution), dtype=np.float32)
    grown = [level.detach() * ((n - 1) / n) for level in levels]
    grown.append(torch.from_numpy(noise).to(device) / n)
    return [level.requires_grad_() for level in grown]
