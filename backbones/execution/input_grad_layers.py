"""Layers whose backward computes only the input gradient: activations take an eighth of the memory.

Autograd keeps the input of a convolution and the output of a clipped activation, four bytes per value. The
gradient of frozen weights is never needed, so a convolution keeps nothing here, and an activation one byte
per value: whether it was clipped. For lite0 at 96 px that is 1.2 MB per image instead of 9.5.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sfm.backbones.execution.conv_kernels import ClipBounds, ConvKernels, HeightWidth, choose_conv_kernels

BACKWARD_BYTES = 5 * 2**20
"""Target size of backward intermediates; the batch is chunked to stay in cache."""

MASK_CHUNK_BYTES = 3 * 2**20
"""Masks of larger tensors are computed in chunks, because the intermediate is as large as the tensor."""


class InputGradConvChain(nn.Module):
    """Convolutions with frozen weights in sequence, each with the clipped activation after it, if any.

    Parameters
    ----------
    links : sequence of (nn.Conv2d, (float, float or None) or None)
        The convolutions, padded with zeros, or timm's `Conv2dSame`; and the bounds of their activations.
    """

    def __init__(self, links: Sequence[tuple[nn.Conv2d, ClipBounds | None]]) -> None:
        super().__init__()
        self.links = list(links)
        self.convolutions = nn.ModuleList(convolution for convolution, _ in links)
        self._kernels: dict[torch.Size, tuple[ConvKernels, ...]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channel, y, x) as the convolutions and their activations do."""
        kernels = self._kernels.get(images.shape[2:])
        if kernels is None:
            kernels = self._kernels[images.shape[2:]] = tuple(self._iterate_kernels(images.shape[2:]))
        if torch.is_grad_enabled() and images.requires_grad:
            output: Tensor = _ConvolveAndClipChain.apply(images, kernels)
            return output
        for kernel in kernels:
            images = kernel.forward(images)
        return images

    def drop_packed_weights(self) -> None:
        """Free the packed weights; they are packed again when needed."""
        self._kernels.clear()

    def _iterate_kernels(self, input_size: HeightWidth) -> Iterator[ConvKernels]:
        for convolution, clip in self.links:
            yield (kernel := choose_conv_kernels(convolution, input_size, clip))
            input_size = kernel.output_size


class InputGradClip(nn.Module):
    """A clipped activation that keeps one byte per value.

    Parameters
    ----------
    clip_bounds : (float, float or None)
        Bounds.
    """

    def __init__(self, clip_bounds: ClipBounds) -> None:
        super().__init__()
        self.clip_bounds = clip_bounds

    def forward(self, values: Tensor) -> Tensor:
        """Clip values."""
        clipped: Tensor = _Clip.apply(values, self.clip_bounds)
        return clipped


class NaNPropagating(nn.Module):
    """A model whose output is NaN where its input has one: clipping in oneDNN would hide it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to features, as the model does."""
        feature: Tensor = self.model(images)
        return feature + 0 * images.detach().sum(dim=(1, 2, 3)).to(feature.dtype)[:, None]


class _ConvolveAndClipChain(torch.autograd.Function):
    """Convolve and clip in sequence; keep only which values were not clipped."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Sequence[ConvKernels]) -> Tensor:
        masks, largest = [], images.nbytes
        for kernel in kernels:
            images = kernel.forward(images)
            masks.append(
                None
                if kernel.clip_bounds is None
                else _make_unclipped_mask(images, kernel.clip_bounds).view(torch.int8)
            )
            largest = max(largest, images.nbytes)
        ctx.save_for_backward(*masks)
        ctx.kernels, ctx.largest = kernels, largest
        ctx.channels_last = images.is_contiguous(memory_format=torch.channels_last)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        kernels, masks, count = ctx.kernels, ctx.saved_tensors, len(gradient)
        if ctx.channels_last:
            # The gradient of a mean over positions has another memory layout.
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        chunk = count
        if count > 1 and len(kernels) > 1 and gradient.device.type != "cuda":
            chunk = _choose_backward_chunk_size(count, ctx.largest)
        if chunk == count:
            return _backpropagate_through_chain(gradient, kernels, masks), None
        chunks = [
            _backpropagate_through_chain(
                part, kernels, [None if mask is None else mask[start : start + chunk] for mask in masks]
            )
            for start, part in zip(range(0, count, chunk), torch.split(gradient, chunk), strict=True)
        ]
        return torch.cat(chunks), None


def _choose_backward_chunk_size(image_count: int, largest_batch_intermediate_bytes: int) -> int:
    """Return how many of `image_count` images go through backward together, to stay in cache.

    Parameters
    ----------
    image_count : int
    largest_batch_intermediate_bytes : int
        Bytes of the largest intermediate of all images.
    """
    max_images = max(1, BACKWARD_BYTES * image_count // largest_batch_intermediate_bytes)
    return math.ceil(image_count / math.ceil(image_count / max_images))


def _backpropagate_through_chain(
    gradient: Tensor, kernels: Sequence[ConvKernels], unclipped_masks: Sequence[Tensor | None]
) -> Tensor:
    """Backpropagate a gradient through a chain of convolutions and clips, the last one first."""
    output_gradient = gradient
    for kernel, mask in zip(reversed(kernels), reversed(unclipped_masks), strict=True):
        if mask is not None:
            # Do not modify the caller's tensor; mask intermediates in place.
            gradient = gradient * mask if gradient is output_gradient else gradient.mul_(mask)
        gradient = kernel.backward_input(gradient)
    return gradient


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, clip_bounds: ClipBounds) -> Tensor:
        clipped = values.clamp(*clip_bounds)
        ctx.save_for_backward(_make_unclipped_mask(clipped, clip_bounds))
        return clipped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask.view(torch.int8), None


def _make_unclipped_mask(clipped_values: Tensor, clip_bounds: ClipBounds) -> Tensor:
    """Return a boolean mask of the values that are at no bound."""
    low, high = clip_bounds
    if high is None:
        return clipped_values.to(torch.bool) if low == 0 else clipped_values.ne(low)
    if low != 0 or clipped_values.device.type == "cuda":
        return clipped_values.ne(low).logical_and_(clipped_values.ne(high))
    # It is zero at both bounds, and several times as fast as comparisons.
    hardtanh_backward: Callable[..., Tensor] = torch.ops.aten.hardtanh_backward.default
    chunks = math.ceil(clipped_values.nbytes / MASK_CHUNK_BYTES)
    if chunks <= 1:
        return hardtanh_backward(clipped_values, clipped_values, low, high).to(torch.bool)
    mask = torch.empty_like(clipped_values, dtype=torch.bool)
    chunk = math.ceil(len(clipped_values) / chunks)
    for values, out in zip(torch.split(clipped_values, chunk), torch.split(mask, chunk), strict=True):
        out.copy_(hardtanh_backward(values, values, low, high))
    return mask
