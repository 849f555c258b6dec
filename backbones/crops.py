"""Boxes of random resized crops, drawn as plain arrays."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Crops:
    """Boxes to cut out of images, one per view; all arrays of shape (views,).

    Attributes
    ----------
    top, left, height, width : ndarray of float64
        The box, in pixels of the image.
    flip : ndarray of bool
        Whether the view is mirrored left to right.
    """

    top: npt.NDArray[np.float64]
    left: npt.NDArray[np.float64]
    height: npt.NDArray[np.float64]
    width: npt.NDArray[np.float64]
    flip: npt.NDArray[np.bool_]


def draw_crops(
    rng: np.random.Generator,
    count: int,
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crops:
    """Draw random resized crops with random mirroring, for square images.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of random numbers.
    count : int
        Number of views.
    size : int
        Side of the images, in pixels.
    area : tuple of float
        Least and largest share of the image's area; drawn uniformly.
    ratio : tuple of float
        Least and largest width / height; drawn log-uniformly. A side that would leave the image is cut to it.

    Returns
    -------
    Crops
    """
    share = rng.uniform(*area, size=count)
    aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), size=count))
    width = np.minimum(size * np.sqrt(share * aspect), size)
    height = np.minimum(size * np.sqrt(share / aspect), size)
    top = rng.uniform(size=count) * (size - height)
    left = rng.uniform(size=count) * (size - width)
    return Crops(top, left, height, width, rng.uniform(size=count) < 0.5)


def make_centre_crops(count: int, size: int, side: int) -> Crops:
    """Return `count` unmirrored boxes of `side` pixels in the middle of images of `size` pixels."""
    inset = np.full(count, (size - side) / 2)
    sides = np.full(count, float(side))
    return Crops(inset, inset, sides, sides, np.zeros(count, dtype=bool))
