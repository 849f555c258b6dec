"""Synthetic images as pyramids: levels of rising resolution that are upsampled and added up.

The coarse levels settle an image's layout before the fine ones exist, which keeps high-frequency noise, to
which a backbone would respond just as well, out of the images.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfm.backbones.views import make_interpolation_matrix
from sfm.distill.resample import Resampling, resampling, sums, sums_back, taps
from sfm.random_streams import make_rng

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
def _colours(device: torch.device, dtype: torch.dtype) -> Tensor:
    return 2 * colour_matrix().to(device, dtype)


@cache
def _widening(side: int, canvas: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrix that upsamples rows of `side` pixels from the right, shape (side, canvas)."""
    whole = make_interpolation_matrix(np.zeros(1), np.full(1, float(side)), side, canvas)
    return whole[0].T.to(device, dtype)


@lru_cache(maxsize=4)
def _heightening(sides: tuple[int, ...], canvas: int, planes: int, device: torch.device) -> Resampling:
    """Matrix that upsamples the columns of levels, and adds them up.

    Its columns are the rows of all levels of the first plane, then those of the second, ...; so each thread
    has its share of the way back, where a row of a coarse level is a sum of very many.
    """
    below = np.cumsum((0, *sides))
    each = [taps(np.zeros(1), np.full(1, float(side)), side, canvas) for side in sides]
    columns = np.concatenate(
        [start + pixels[0] for start, (pixels, _) in zip(below, each, strict=False)], axis=1
    )
    weights = np.concatenate([weights[0] for _, weights in each], axis=1)
    first = below[-1] * np.arange(planes)[:, None, None]
    return resampling(
        (first + columns).reshape(planes * canvas, columns.shape[1]),
        np.tile(weights, (planes, 1)),
        planes * below[-1],
        device,
    )


@cache
def _dense_heightening(
    sides: tuple[int, ...], canvas: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Matrix that does the same to one plane, from the left, shape (canvas, rows of all levels)."""
    whole = [
        make_interpolation_matrix(np.zeros(1), np.full(1, float(side)), side, canvas)[0] for side in sides
    ]
    return torch.cat(whole, dim=1).to(device, dtype)


def heightened(widened: Tensor, sides: tuple[int, ...], canvas: int, *, dense: bool) -> Tensor:
    """Upsample the columns of levels, and add them up; without a gradient, see :func:`heightened_back`.

    Parameters
    ----------
    widened : Tensor, shape (planes, sum of sides, canvas)
        The levels of each plane stacked on each other; contiguous.
    sides : tuple of int
        Of the levels.
    canvas : int
    dense : bool
        Whether zeros are multiplied too, as suits a GPU.

    Returns
    -------
    Tensor, shape (planes, canvas, canvas)
        Contiguous.
    """
    planes, device = len(widened), widened.device
    if dense:
        matrix = _dense_heightening(sides, canvas, device, widened.dtype)
        return torch.bmm(matrix.expand(planes, -1, -1), widened)
    sparse = _heightening(sides, canvas, planes, device)
    return sums(widened.view(-1, canvas), sparse).view(planes, canvas, canvas)


def heightened_back(gradient: Tensor, sides: tuple[int, ...], canvas: int, *, dense: bool) -> Tensor:
    """Take a gradient back through :func:`heightened`.

    Parameters
    ----------
    gradient : Tensor, shape (planes, canvas, canvas)
        Contiguous.
    sides : tuple of int
    canvas : int
    dense : bool

    Returns
    -------
    Tensor, shape (planes, sum of sides, canvas)
    """
    planes, device = len(gradient), gradient.device
    if dense:
        matrix = _dense_heightening(sides, canvas, device, gradient.dtype)
        return torch.bmm(matrix.T.expand(planes, -1, -1), gradient)
    sparse = _heightening(sides, canvas, planes, device)
    return sums_back(gradient.view(-1, canvas), sparse).view(planes, -1, canvas)


class _Decode(torch.autograd.Function):
    """Written out, since the small operations of many levels take longer to be noted down than to be done."""

    @staticmethod
    def forward(ctx: Any, canvas: int, *levels: Tensor) -> Tensor:
        count, device, dtype = len(levels[0]), levels[0].device, levels[0].dtype
        coarse = [level for level in levels if level.shape[-1] < canvas]
        sides = tuple(level.shape[-1] for level in coarse)
        widened = [
            (level.reshape(-1, side) @ _widening(side, canvas, device, dtype)).view(-1, side, canvas)
            for level, side in zip(coarse, sides, strict=True)
        ]
        dense = device.type == "cuda"
        total = heightened(torch.cat(widened, dim=1), sides, canvas, dense=dense).view(count, 3, -1)
        if len(coarse) < len(levels):
            total += levels[-1].flatten(2)
        colours = _colours(device, dtype).expand(count, -1, -1)
        images = torch.bmm(colours, total).sigmoid_().view(count, 3, canvas, canvas)
        ctx.save_for_backward(images)
        ctx.sides, ctx.colours, ctx.dense = sides, colours, dense
        ctx.has_finest = len(coarse) < len(levels)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        count, _, canvas, _ = images.shape
        mixed = torch.ops.aten.sigmoid_backward(gradient, images).reshape(count, 3, -1)
        total = torch.bmm(ctx.colours.mT, mixed)
        widened = heightened_back(total.view(-1, canvas, canvas), ctx.sides, canvas, dense=ctx.dense)
        place = canvas, images.device, images.dtype
        levels = [
            (rows.reshape(-1, canvas) @ _widening(side, *place).T).view(count, 3, side, side)
            for rows, side in zip(torch.split(widened, ctx.sides, dim=1), ctx.sides, strict=True)
        ]
        return None, *levels, *([total.view(images.shape)] if ctx.has_finest else [])


def decode(levels: Sequence[Tensor], canvas: int) -> Tensor:
    """Turn pyramids into images: ``sigmoid(2 * colour(sum of upsampled levels))``.

    Upsampling is bilinear with half-pixel centres, one axis after the other; the second upsamples the widened
    levels and adds them up in one, so that no level is blown up to full size by itself.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        Coarse to fine, the first smaller than the canvas; differentiable (once).
    canvas : int
        Side of the images, in pixels.

    Returns
    -------
    Tensor, shape (N, 3, canvas, canvas)
        Values in [0, 1].
    """
    images: Tensor = _Decode.apply(canvas, *levels)
    return images


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
    noise = _noise(make_rng(seed, LEVEL_NOISE, n), resolution, part or slice(0, count))
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
