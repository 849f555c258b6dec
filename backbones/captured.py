"""Backbones as CUDA graphs: recorded once and replayed, so that a GPU never waits for Python.

Forward and backward of a transformer are some thousand small kernels. Launching them one by one takes a CPU
longer than a GPU takes to do them, unless they are of more images than there need be in memory.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Captured(nn.Module):
    """A model that replays one recording of its forward and one of its backward pass.

    What the backward pass needs lies in one place: a forward pass overwrites what the one before has left
    there. So the gradient can be had of the last one only; any other raises a RuntimeError.

    Parameters
    ----------
    model : nn.Module
        No parameter taking a gradient; it must do the same for all images of a shape.
    example : Tensor, shape (images, 3, y, x)
        As it will be fed with, on its GPU. Fewer images are filled up, more go through the model as it is.

    Attributes
    ----------
    held_bytes : int
        GPU memory that the recordings keep for themselves.

    Raises
    ------
    RuntimeError
        If the model cannot be recorded.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        self.images = len(example)
        self._turn = 0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(example.device)
        static = example.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with warnings.catch_warnings():
            # It is a stream of their own that torch records them on; nobody else's waits for it.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream", UserWarning)
            self._replay: Any = torch.cuda.make_graphed_callables(_Only(model), (static,))
        torch.cuda.empty_cache()
        self.held_bytes = torch.cuda.memory_reserved(example.device) - before

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to features, as the model does."""
        count = len(images)
        if count > self.images:
            whole: Tensor = self.model(images)
            return whole
        if count < self.images:
            images = torch.cat([images, images.new_zeros((self.images - count, *images.shape[1:]))])
        self._turn += 1
        found: Tensor = self._replay(images)[:count].clone()
        turn = self._turn

        def look(gradient: Tensor) -> Tensor:
            if turn != self._turn:
                raise RuntimeError("another forward pass has overwritten what this gradient needs")
            return gradient

        if found.requires_grad:
            hook: Any = found.register_hook
            hook(look)
        return found


class _Only(nn.Module):
    """A model in a module of its own: recording changes the module that is recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        feature: Tensor = self.model(images)
        return feature
