"""Augmented views of synthetic images: differentiable, and the same for equal seed and step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.crops import Crops, draw_crops
from sfm.distill.resample import look
from sfm.random_streams import make_rng

VIEWS = 102
"""Purpose of the random streams that views are drawn from."""

NOISE_MEAN, NOISE_STD, NOISE_SHARE = 0.5, 0.2, 0.5


@dataclass(frozen=True)
class Views:
    """How to look at images, one entry per view.

    Attributes
    ----------
    crops : Crops
        Boxes and mirroring.
    noisy : ndarray of bool, shape (views,)
        Which views get Gaussian noise.
    noise_seed : ndarray of int64, shape (views,)
        The seed of each view's own noise, so that it does not depend on the views computed with it.
    """

    crops: Crops
    noisy: npt.NDArray[np.bool_]
    noise_seed: npt.NDArray[np.int64]

    def part(self, some: slice) -> "Views":
        """Return some of the views."""
        c = self.crops
        crops = Crops(c.top[some], c.left[some], c.height[some], c.width[some], c.flip[some])
        return Views(crops, self.noisy[some], self.noise_seed[some])


def draw_views(seed: int, step: int, count: int, size: int) -> Views:
    """Draw the views of a step. They depend on the arguments alone, not on what was drawn before.

    Parameters
    ----------
    seed, step : int
        Of the run, and the number of the step in it.
    count : int
        How many views.
    size : int
        Side of the images looked at, in pixels.

    Returns
    -------
    Views
    """
    rng = make_rng(seed, VIEWS, step)
    return Views(
        crops=draw_crops(rng, count, size),
        noisy=rng.uniform(size=count) < NOISE_SHARE,
        noise_seed=rng.integers(2**63 - 1, size=count),
    )


def augment(images: Tensor, views: Views, out: int) -> Tensor:
    """Look at every image through its views: random resized crop, mirroring, Gaussian noise N(.5, .2^2).

    Parameters
    ----------
    images : Tensor, shape (N, 3, size, size)
        Values in [0, 1]; differentiable.
    views : Views
        Of N * A views: the A views of the first image, then those of the second, ...
    out : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (N * A, 3, out, out)
        Noise is added without clipping, so values may leave [0, 1].
    """
    seen = look(images, views.crops, out)
    noisy = np.flatnonzero(views.noisy)
    noise = seen.new_empty((len(noisy), *seen.shape[1:]))
    generator = torch.Generator(seen.device)
    for values, view in zip(noise, noisy, strict=True):
        values.normal_(NOISE_MEAN, NOISE_STD, generator=generator.manual_seed(int(views.noise_seed[view])))
    return seen.index_add(0, torch.from_numpy(noisy).to(seen.device), noise)
