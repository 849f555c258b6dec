"""Apply horizontal flips and random resized crops to images, as products with small matrices.

Crop, flip and bilinear resampling are separable, so a view of an image is ``R @ image @ C.T`` with one
matrix per axis. Matrix products are differentiable, and deterministic on every device; ``grid_sample`` and
``interpolate`` are not, in their backward pass, on CUDA.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.crops import Crops


def make_interpolation_matrices(
    starts: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.float64],
    input_pixels: int,
    output_pixels: int,
    is_mirrored: npt.NDArray[np.bool_] | None = None,
    device: torch.device | None = None,
    edge: CropEdge = "clip",
) -> Tensor:
    """Return matrices that resample intervals of an axis bilinearly (half-pixel centres).

    Parameters
    ----------
    starts, lengths : ndarray, shape (n,)
        The intervals, in pixels of the input axis.
    input_pixels, output_pixels : int
        Length of the input axis and of the output axis, in pixels.
    is_mirrored : ndarray of bool, shape (n,), optional
        Which outputs run backwards.
    device : torch.device, optional
        Device of the result; default: the CPU.
    edge : {"clip", "zero"}
        What lies outside of the axis: its edge pixels repeated, or zeros.

    Returns
    -------
    Tensor, shape (n, out, size), float32
        Rows are non-negative and sum to one; to less than one at zeros.
    """
    fraction = (np.arange(output_pixels) + 0.5) / output_pixels
    positions = starts[:, None] + lengths[:, None] * fraction - 0.5
    if is_mirrored is not None:
        positions = np.where(is_mirrored[:, None], positions[:, ::-1], positions)
    # Positions are copied to the device, not weights, of which there are `input_pixels` times as many.
    if edge == "clip":
        positions = np.clip(positions, 0, input_pixels - 1)
    sampled = torch.from_numpy(np.ascontiguousarray(positions)).to(device)
    pixels = torch.arange(input_pixels, device=device, dtype=torch.float64)
    return (sampled[:, :, None] - pixels).abs_().neg_().add_(1).clamp_(min=0).float()


def apply_crops(images: Tensor, crops: Crops, output_pixels: int) -> Tensor:
    """Cut crops out of images, mirror and resize them.

    Parameters
    ----------
    images : Tensor, shape (n, channel, size, size)
        Square images; differentiable.
    crops : Crops
        One box per image; `crops.edge` says what views show outside of it.
    output_pixels : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (n, channel, out, out)
        Same dtype and device as `images`.
    """
    size, device = images.shape[-1], images.device
    rows = make_interpolation_matrices(
        crops.top, crops.height, size, output_pixels, device=device, edge=crops.edge
    ).to(images)
    columns = make_interpolation_matrices(
        crops.left, crops.width, size, output_pixels, crops.flip, device, crops.edge
    ).to(images)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)
