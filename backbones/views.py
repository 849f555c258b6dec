"""Augmented views of images: horizontal flip and random resized crop, as pairs of small matrices.

Crop, flip and bilinear resampling are separable, so a view of an image is ``R @ image @ C.T`` with one
matrix per axis. Matrix products are differentiable, and deterministic on every device; ``grid_sample`` and
``interpolate`` are not, in their backward pass, on CUDA.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def stream(seed: int, *counter: int) -> np.random.Generator:
    """Return the random stream that belongs to a seed and a position, whatever was drawn before.

    Parameters
    ----------
    seed : int
        The seed of the run.
    *counter : int
        Where in the run: a purpose, a step, an image. At most three values below 2**64.

    Returns
    -------
    numpy.random.Generator
        A Philox generator: equal arguments give equal numbers, different ones independent numbers.
    """
    if len(counter) > 3:
        raise ValueError(f"at most three counters, got {len(counter)}")
    # As an array: numpy turns a list with a value above 2**63 into floats.
    position = np.array([0, *counter, *([0] * (3 - len(counter)))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=seed, counter=position))


@dataclass(frozen=True)
class Crops:
    """Boxes to look through, one per view; all arrays of shape (views,).

    Attributes
    ----------
    top, left, height, width : ndarray of float64
        The box in pixels of the image looked at.
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
        Where the randomness comes from.
    count : int
        How many views.
    size : int
        Side of the images looked at, in pixels.
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


def centre_crop(count: int, size: int, side: int) -> Crops:
    """Return `count` unmirrored boxes of `side` pixels in the middle of images of `size` pixels."""
    inset = np.full(count, (size - side) / 2)
    whole = np.full(count, float(side))
    return Crops(inset, inset, whole, whole, np.zeros(count, dtype=bool))


def interpolation_matrix(
    start: npt.NDArray[np.float64],
    length: npt.NDArray[np.float64],
    size: int,
    out: int,
    mirror: npt.NDArray[np.bool_] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Build the matrices that resample intervals of an axis bilinearly (half-pixel centres, edges held).

    Parameters
    ----------
    start, length : ndarray, shape (n,)
        The intervals, in pixels of the input axis.
    size, out : int
        Length of the input axis and of the output axis, in pixels.
    mirror : ndarray of bool, shape (n,), optional
        Which outputs run backwards.
    device : torch.device, optional
        Where they are to be; the CPU if not given.

    Returns
    -------
    Tensor, shape (n, out, size), float32
        Rows are non-negative and sum to one.
    """
    place = (np.arange(out) + 0.5) / out
    at = start[:, None] + length[:, None] * place - 0.5
    if mirror is not None:
        at = np.where(mirror[:, None], at[:, ::-1], at)
    # Only the places travel: there are `size` times as many weights.
    places = torch.from_numpy(np.clip(at, 0, size - 1)).to(device)
    pixels = torch.arange(size, device=device, dtype=torch.float64)
    return (places[:, :, None] - pixels).abs_().neg_().add_(1).clamp_(min=0).float()


def look(images: Tensor, crops: Crops, out: int) -> Tensor:
    """Look at images through crops.

    Parameters
    ----------
    images : Tensor, shape (n, channel, size, size)
        Square images; differentiable.
    crops : Crops
        One box per image.
    out : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (n, channel, out, out)
        Same dtype and device as `images`.
    """
    size, device = images.shape[-1], images.device
    rows = interpolation_matrix(crops.top, crops.height, size, out, device=device).to(images)
    columns = interpolation_matrix(crops.left, crops.width, size, out, crops.flip, device).to(images)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)
