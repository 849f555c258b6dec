"""Convert 8-bit pixels to batches of images, on the CPU or a GPU."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def pixels_to_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Convert 8-bit pixels to a batch of images.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (batch, y, x, channel)

    Returns
    -------
    Tensor, shape (batch, channel, y, x), float32 in [0, 1]
        In channels-last memory format, which is faster for convolutions.
    """
    return torch.from_numpy(np.divide(pixels, 255, dtype=np.float32)).permute(0, 3, 1, 2)


def pixels_to_tensor_on_device(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return a batch of images on a device: float32 in [0, 1], shape (batch, channel, y, x)."""
    if device.type == "cpu":
        return pixels_to_tensor(pixels)
    sent = torch.from_numpy(pixels).pin_memory().to(device, non_blocking=True)
    # The divisor is a tensor: with a Python number, CUDA multiplies by the reciprocal and rounds differently.
    return sent.permute(0, 3, 1, 2).float() / torch.full((), 255.0, device=device)
