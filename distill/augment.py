"""Differentiable augmentation: random resized crop, flip and noise, reproducible from seed and step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.crops import Crops, draw_crops, make_centre_crops, select_crops
from sfm.distill.resample import apply_several_crops_per_image
from sfm.random_streams import make_rng

AUGMENTATION_STREAM = 102
"""Key of the random streams of augmentations."""

NOISE_MEAN, NOISE_STD = 0.5, 0.2

PUBLISHED_NOISY_SHARE = 0.5
"""Share of the views that get noise in the published code."""


@dataclass(frozen=True)
class AugmentationParameters:
    """Crop, flip and noise of every view.

    Attributes
    ----------
    crops : Crops
        Boxes and mirroring.
    is_noisy : ndarray of bool, shape (views,)
        Which views get Gaussian noise.
    noise_seeds : ndarray of int64, shape (views,)
        The seed of each view's own noise, so that it does not depend on the views computed with it.
    """

    crops: Crops
    is_noisy: npt.NDArray[np.bool_]
    noise_seeds: npt.NDArray[np.int64]

    def select_views(self, view_slice: slice) -> "AugmentationParameters":
        """Return the parameters of some of the views."""
        crops = select_crops(self.crops, view_slice)
        return AugmentationParameters(crops, self.is_noisy[view_slice], self.noise_seeds[view_slice])


def draw_augmentation(
    seed: int,
    step: int,
    total_view_count: int,
    image_pixels: int,
    crop_edge: CropEdge = "clip",
    noisy_share: float = PUBLISHED_NOISY_SHARE,
) -> AugmentationParameters:
    """Draw the augmentation of a step. It depends on the arguments only, not on earlier draws.

    Parameters
    ----------
    seed, step : int
        Of the run, and the number of the step in it.
    total_view_count : int
        Number of views of all images, in all processes.
    image_pixels : int
        Side of the images that are augmented, in pixels.
    crop_edge : {"clip", "zero"}
        Whether crops are cut to the image, or show zeros outside of it; see :func:`draw_crops`.
    noisy_share : float
        Probability that a view gets noise.

    Returns
    -------
    AugmentationParameters
    """
    rng = make_rng(seed, AUGMENTATION_STREAM, step)
    return AugmentationParameters(
        crops=draw_crops(rng, total_view_count, image_pixels, edge=crop_edge),
        is_noisy=rng.uniform(size=total_view_count) < noisy_share,
        noise_seeds=rng.integers(2**63 - 1, size=total_view_count),
    )


def make_whole_image_views(total_view_count: int, image_pixels: int) -> AugmentationParameters:
    """Return the parameters of views that show whole images as they are: no crop, no flip, no noise."""
    return AugmentationParameters(
        crops=make_centre_crops(total_view_count, image_pixels, image_pixels),
        is_noisy=np.zeros(total_view_count, dtype=bool),
        noise_seeds=np.zeros(total_view_count, dtype=np.int64),
    )


def augment(images: Tensor, parameters: AugmentationParameters, output_pixels: int) -> Tensor:
    """Return the views of images: crop, flip and Gaussian noise N(.5, .2^2), as the parameters say.

    Parameters
    ----------
    images : Tensor, shape (N, 3, size, size)
        Values in [0, 1]; differentiable.
    parameters : AugmentationParameters
        Of N * A views: the A views of the first image, then those of the second, ...
    output_pixels : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (N * A, 3, image_size, image_size)
        Noise is added without clipping, so values may leave [0, 1].
    """
    views = apply_several_crops_per_image(images, parameters.crops, output_pixels)
    noisy = np.flatnonzero(parameters.is_noisy)
    noise = views.new_empty((len(noisy), *views.shape[1:]))
    generator = torch.Generator(views.device)
    for values, view in zip(noise, noisy, strict=True):
        seed = int(parameters.noise_seeds[view])
        values.normal_(NOISE_MEAN, NOISE_STD, generator=generator.manual_seed(seed))
    return views.index_add(0, torch.from_numpy(noisy).to(views.device), noise)
