"""Boxes of random resized crops, drawn as plain arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.backbones.crop_edge import CropEdge


@dataclass(frozen=True)
class Crops:
    """Boxes to cut out of images, one per view; all arrays of shape (views,).

    Attributes
    ----------
    top, left, height, width : ndarray of float64
        The box, in pixels of the image.
    flip : ndarray of bool
        Whether the view is mirrored left to right.
    edge : {"clip", "zero"}
        What lies outside of the image for bilinear resampling: its edge pixels repeated, or zeros.
    """

    top: npt.NDArray[np.float64]
    left: npt.NDArray[np.float64]
    height: npt.NDArray[np.float64]
    width: npt.NDArray[np.float64]
    flip: npt.NDArray[np.bool_]
    edge: CropEdge = "clip"


def draw_crops(
    rng: np.random.Generator,
    crop_count: int,
    image_pixels: int,
    *,
    edge: CropEdge = "clip",
    area_share_range: tuple[float, float] = (0.08, 1.0),
    aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crops:
    """Draw random resized crops with random mirroring, for square images.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of random numbers.
    crop_count : int
        Number of views.
    image_pixels : int
        Side of the images, in pixels.
    edge : {"clip", "zero"}
        "clip": a side that would be longer than the image is cut to it. "zero": it is not, and the view shows
        zeros there, as in the published code; of boxes of the default shares and ratios, one in seven.
        The random numbers are the same.
    area_share_range : tuple of float
        Least and largest share of the image's area; drawn uniformly.
    aspect_ratio_range : tuple of float
        Least and largest width / height; drawn log-uniformly.

    Returns
    -------
    Crops
    """
    share = rng.uniform(*area_share_range, size=crop_count)
    aspect = np.exp(
        rng.uniform(np.log(aspect_ratio_range[0]), np.log(aspect_ratio_range[1]), size=crop_count)
    )
    largest_side = image_pixels if edge == "clip" else np.inf
    width = np.minimum(image_pixels * np.sqrt(share * aspect), largest_side)
    height = np.minimum(image_pixels * np.sqrt(share / aspect), largest_side)
    # A box that is longer than the image begins before it, and covers it.
    top = rng.uniform(size=crop_count) * (image_pixels - height)
    left = rng.uniform(size=crop_count) * (image_pixels - width)
    return Crops(top, left, height, width, rng.uniform(size=crop_count) < 0.5, edge)


def make_centre_crops(crop_count: int, image_pixels: int, crop_pixels: int) -> Crops:
    """Return `crop_count` unmirrored boxes of `crop_pixels` pixels centred in squares of `image_pixels`."""
    inset = np.full(crop_count, (image_pixels - crop_pixels) / 2)
    sides = np.full(crop_count, float(crop_pixels))
    return Crops(inset, inset, sides, sides, np.zeros(crop_count, dtype=bool))


def select_crops(crops: Crops, crop_slice: slice) -> Crops:
    """Return the boxes of a slice of the views."""
    return Crops(
        crops.top[crop_slice],
        crops.left[crop_slice],
        crops.height[crop_slice],
        crops.width[crop_slice],
        crops.flip[crop_slice],
        crops.edge,
    )


def concatenate_crops(parts: Sequence[Crops]) -> Crops:
    """Return the boxes of all parts, one part after another; all parts have the same `edge`."""
    (edge,) = {part.edge for part in parts}
    return Crops(
        np.concatenate([part.top for part in parts]),
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.height for part in parts]),
        np.concatenate([part.width for part in parts]),
        np.concatenate([part.flip for part in parts]),
        edge,
    )
