"""Apply horizontal flips and random resized crops to images, as products with small matrices.

Crop, flip and bilinear resampling are separable, so a view of an image is ``R @ image @ C.T`` with one
matrix per axis. Matrix products are differentiable, and deterministic on every device; ``grid_sample`` and
``interpolate`` are not, in their backward pass, on CUDA.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.crops import Crops


def make_interpolation_matrix(
    start: npt.NDArray[np.float64],
    length: npt.NDArray[np.float64],
    size: int,
    out: int,
    mirror: npt.NDArray[np.bool_] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return matrices that resample intervals of an axis bilinearly (half-pixel centres, clamped edges).

    Parameters
    ----------
    start, length : ndarray, shape (n,)
        The intervals, in pixels of the input axis.
    size, out : int
        Length of the input axis and of the output axis, in pixels.
    mirror : ndarray of bool, shape (n,), optional
        Which outputs run backwards.
    device : torch.device, optional
        Device of the result; default: the CPU.

    Returns
    -------
    Tensor, shape (n, out, size), float32
        Rows are non-negative and sum to one.
    """
    fraction = (np.arange(out) + 0.5) / out
    positions = start[:, None] + length[:, None] * fraction - 0.5
    if mirror is not None:
        positions = np.where(mirror[:, None], positions[:, ::-1], positions)
    # Positions are copied to the device, not weights, of which there are `size` times as many.
    clamped = torch.from_numpy(np.clip(positions, 0, size - 1)).to(device)
    pixels = torch.arange(size, device=device, dtype=torch.float64)
    return (clamped[:, :, None] - pixels).abs_().neg_().add_(1).clamp_(min=0).float()


def apply_crops(images: Tensor, crops: Crops, out: int) -> Tensor:
    """Cut crops out of images, mirror and resize them.

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
    rows = make_interpolation_matrix(crops.top, crops.height, size, out, device=device).to(images)
    columns = make_interpolation_matrix(crops.left, crops.width, size, out, crops.flip, device).to(images)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)
