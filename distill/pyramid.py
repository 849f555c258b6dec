"""Synthetic images as pyramids: levels of rising resolution that are upsampled and added up.

The coarse levels settle an image's layout before the fine ones exist, which keeps high-frequency noise, to
which a backbone would respond just as well, out of the images.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.crops import stream
from sfm.backbones.views import interpolation_matrix
from sfm.distill.resample import Resampling, resample, resampling, taps

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
def _widening(side: int, canvas: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrix that upsamples rows of `side` pixels from the right, shape (side, canvas)."""
    whole = interpolation_matrix(np.zeros(1), np.full(1, float(side)), side, canvas)
    return whole[0].T.to(device, dtype)


@cache
def _heightening(sides: tuple[int, ...], canvas: int, device: torch.device) -> Resampling:
    """Matrix that upsamples columns of levels stacked on each other and adds them up."""
    below = np.cumsum((0, *sides))
    each = [taps(np.zeros(1), np.full(1, float(side)), side, canvas) for side in sides]
    columns = np.concatenate(
        [start + pixels[0] for start, (pixels, _) in zip(below, each, strict=False)], axis=1
    )
    return resampling(columns, np.concatenate([weights[0] for _, weights in each], axis=1), below[-1], device)


@cache
def _dense_heightening(sides: tuple[int, ...], canvas: int, device: torch.device) -> Tensor:
    """Matrix that does the same from the left, shape (canvas, rows of all levels)."""
    whole = [interpolation_matrix(np.zeros(1), np.full(1, float(side)), side, canvas)[0] for side in sides]
    return torch.cat(whole, dim=1).to(device)


def heightened(stacked: Tensor, sides: tuple[int, ...], canvas: int) -> Tensor:
    """Upsample columns of levels stacked on each other, and add them up.

    Parameters
    ----------
    stacked : Tensor, shape (sum of sides, width)
        Contiguous; differentiable.
    sides : tuple of int
        Of the levels.
    canvas : int

    Returns
    -------
    Tensor, shape (canvas, width)
    """
    if stacked.device.type == "cuda":
        return _dense_heightening(sides, canvas, stacked.device).to(stacked.dtype) @ stacked
    return resample(stacked, _heightening(sides, canvas, stacked.device))


def decode(levels: Sequence[Tensor], canvas: int) -> Tensor:
    """Turn pyramids into images: ``sigmoid(2 * colour(sum of upsampled levels))``.

    Upsampling is bilinear with half-pixel centres, one axis after the other; the second upsamples the widened
    levels and adds them up in one, so that no level is blown up to full size by itself.

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
    count, device, dtype = len(levels[0]), levels[0].device, levels[0].dtype
    coarse = [level for level in levels if level.shape[-1] < canvas]
    sides = tuple(level.shape[-1] for level in coarse)
    widened = [
        level.flatten(0, 1).transpose(0, 1) @ _widening(side, canvas, device, dtype)
        for level, side in zip(coarse, sides, strict=True)
    ]
    rows = heightened(torch.cat(widened).flatten(1), sides, canvas)
    total = rows.view(canvas, count, 3, canvas).permute(1, 2, 0, 3)
    if len(coarse) < len(levels):
        total = levels[-1] + total
    colours = (2 * colour_matrix()).to(total).expand(count, -1, -1)
    mixed = torch.bmm(colours, total.reshape(count, 3, -1))
    return mixed.sigmoid_().view(count, 3, canvas, canvas)


def grow(
    levels: Sequence[Tensor],
    resolution: int,
    count: int,
    seed: int,
    device: torch.device,
    part: slice | None = None,
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
        Number of images of the run.
    seed : int
        Of the run. What an image's new level is depends on it, on n, and on the image's number alone.
    device : torch.device
    part : slice, optional
        Which of the images the levels are of, if not of all; then N of them.

    Returns
    -------
    list of Tensor
        New leaves that require gradients, float32.
    """
    n = len(levels) + 1
    noise = _noise(stream(seed, LEVEL_NOISE, n), resolution, part or slice(0, count))
    grown = [level.detach() * ((n - 1) / n) for level in levels]
    grown.append(torch.from_numpy(noise).to(device) / n)
    return [level.requires_grad_() for level in grown]


def _noise(rng: np.random.Generator, resolution: int, part: slice) -> npt.NDArray[np.float32]:
    """Draw what the images up to the last of a part start from; keep that of the part."""
    noise = np.empty((part.stop - part.start, 3, resolution, resolution), dtype=np.float32)
    others = np.empty_like(noise[0])
    for image in range(part.stop):
        out = others if image < part.start else noise[image - part.start]
        rng.standard_normal(dtype=np.float32, out=out)
    return noise
