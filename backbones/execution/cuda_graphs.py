"""Replay forward and backward as CUDA graphs: ViT-B/14, 25 images: 13.3 ms, not 20.6 (docs/distillation.md).

Forward and backward of a transformer are a thousand small kernels. A CPU takes longer to launch them than a
GPU to run them, unless batches are very large.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class CudaGraphModel(nn.Module):
    """A model that replays one recording of its forward and one of its backward pass.

    The recording has one activation buffer, which the next forward pass overwrites. So only the last
    forward pass can be backpropagated; any other raises a RuntimeError.

    Parameters
    ----------
    model : nn.Module
        No parameter taking a gradient; its control flow must not depend on values.
    example_images : Tensor, shape (images, 3, y, x)
        A batch of the size to record, on the GPU. Smaller batches are padded, larger ones run eagerly.

    Attributes
    ----------
    held_bytes : int
        GPU memory that the recordings hold.

    Raises
    ------
    RuntimeError
        If the model cannot be recorded.
    """

    def __init__(self, model: nn.Module, example_images: Tensor) -> None:
        super().__init__()
        self.model = model
        self.batch_size = len(example_images)
        self._passes = 0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(example_images.device)
        static = example_images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with warnings.catch_warnings():
            # torch records on a separate stream that is never synchronised.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream", UserWarning)
            self._replay: Any = torch.cuda.make_graphed_callables(_GraphCaptureWrapper(model), (static,))
        torch.cuda.empty_cache()
        self.held_bytes = torch.cuda.memory_reserved(example_images.device) - before

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to features, as the model does."""
        count = len(images)
        if count > self.batch_size:
            eager: Tensor = self.model(images)
            return eager
        if count < self.batch_size:
            images = torch.cat([images, images.new_zeros((self.batch_size - count, *images.shape[1:]))])
        self._passes += 1
        features: Tensor = self._replay(images)[:count].clone()
        current = self._passes

        def require_last_pass(gradient: Tensor) -> Tensor:
            if current != self._passes:
                raise RuntimeError("another forward pass has overwritten what this gradient needs")
            return gradient

        if features.requires_grad:
            register_hook: Any = features.register_hook
            register_hook(require_last_pass)
        return features


class _GraphCaptureWrapper(nn.Module):
    """A wrapper around a model, because recording changes the module that is recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(images)
        return features
