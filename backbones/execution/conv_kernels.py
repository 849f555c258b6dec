"""Packed oneDNN weights and transposed backward kernels: each saves a third of a step on a CPU.

Measured with lite0 (``python benchmarks/execution.py``). oneDNN reorders weights in every call otherwise. The
input gradient is a forward convolution with the transposed kernel wherever that is faster.
"""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

ClipBounds = tuple[float, float | None]
"""Minimum and maximum of an activation; None: no maximum."""

HeightWidth = torch.Size
"""Height and width of an image or a feature map."""

AxisGeometry = tuple[int, int, int, int, int]
"""Of one axis: input size, padding, kernel size, stride, dilation."""

MAX_IMAGE_CHANNELS = 4
"""Maximum number of channels of images; hidden layers have more."""


@dataclass(frozen=True)
class ConvKernels:
    """Kernels of a convolution and the activation after it, for inputs of one size.

    Attributes
    ----------
    forward : callable
        Convolves and clips.
    backward_input : callable
        Maps the gradient of the convolution's output to that of its input; packs its weights on first use.
    clip_bounds : (float, float or None) or None
        Bounds of the activation.
    output_size : torch.Size
        Height and width of the output.
    """

    forward: Callable[[Tensor], Tensor]
    backward_input: Callable[[Tensor], Tensor]
    clip_bounds: ClipBounds | None
    output_size: HeightWidth


def choose_conv_kernels(
    convolution: Any, input_size: HeightWidth, clip_bounds: ClipBounds | None
) -> ConvKernels:
    """Choose the kernels of a convolution for inputs of a height and width."""
    from timm.layers.conv2d_same import Conv2dSame  # slow to import
    from timm.layers.padding import get_same_padding, pad_same

    c = convolution
    if not isinstance(c, Conv2dSame):
        return _choose_kernels_with_weight_and_padding(c, input_size, tuple(c.padding), c.weight, clip_bounds)
    sides = zip(input_size, c.kernel_size, c.stride, c.dilation, strict=True)
    missing = [get_same_padding(*side) for side in sides]
    if all(pixels % 2 == 0 for pixels in missing):
        return _choose_kernels_with_weight_and_padding(
            c, input_size, tuple(pixels // 2 for pixels in missing), c.weight, clip_bounds
        )
    if all(pixels % 2 for pixels in missing) and _is_depthwise(c) and _suits_onednn(c):
        # With a row and a column of zeros before it the kernel is centred: no image is copied into a larger
        # one.
        wider = nn.functional.pad(c.weight, (1, 0, 1, 0)).contiguous(memory_format=torch.channels_last)
        return _choose_kernels_with_weight_and_padding(
            c, input_size, tuple(pixels // 2 + 1 for pixels in missing), wider, clip_bounds
        )
    padded_size = torch.Size(side + pixels for side, pixels in zip(input_size, missing, strict=True))
    inner = _choose_kernels_with_weight_and_padding(c, padded_size, (0, 0), c.weight, clip_bounds)
    top, left = (pixels // 2 for pixels in missing)

    def forward(images: Tensor) -> Tensor:
        return inner.forward(pad_same(images, list(c.kernel_size), list(c.stride), list(c.dilation)))

    def backward_input(gradient: Tensor) -> Tensor:
        padded = inner.backward_input(gradient)
        return padded[:, :, top : top + input_size[0], left : left + input_size[1]]

    return ConvKernels(forward, backward_input, clip_bounds, inner.output_size)


def _choose_kernels_with_weight_and_padding(
    convolution: Any,
    input_size: HeightWidth,
    padding: tuple[int, ...],
    weight: Tensor,
    clip_bounds: ClipBounds | None,
) -> ConvKernels:
    """Choose kernels for a weight and padding in place of the convolution's; both sides are padded alike."""
    c, kernel = convolution, weight.shape[2:]
    forward = _make_conv_and_clip(weight, c.bias, c.stride, padding, c.dilation, c.groups, clip_bounds)
    sides = list(zip(input_size, padding, kernel, c.stride, c.dilation, strict=True))
    output_size = torch.Size(
        (side + 2 * pixels - dilation * (extent - 1) - 1) // stride + 1
        for side, pixels, extent, stride, dilation in sides
    )
    margin = tuple(side - 1 - pixels for side, pixels in zip(kernel, padding, strict=True))
    depthwise, slow = _is_depthwise(c), not _suits_onednn(c) or min(margin) < 0
    if not slow and c.groups == 1 and c.stride[0] == c.stride[1] > 1 and c.in_channels <= MAX_IMAGE_CHANNELS:
        backward = _make_strided_input_backward(weight, c.stride[0], padding, input_size)
    elif slow or not (depthwise or (c.groups == 1 and c.stride == (1, 1))):
        backward = _make_aten_input_backward(c, weight, padding, input_size)
    else:
        backward = _make_transposed_input_backward(c, weight, margin, sides)
    return ConvKernels(forward, backward, clip_bounds, output_size)


def _make_aten_input_backward(
    convolution: Any, weight: Tensor, padding: tuple[int, ...], input_size: HeightWidth
) -> Callable[[Tensor], Tensor]:
    """Return the input gradient as the library computes it."""
    c = convolution
    input_gradient: Any = conv2d_input

    def backward(gradient: Tensor) -> Tensor:
        own, shape = weight.to(gradient.dtype), (len(gradient), c.in_channels, *input_size)
        if gradient.device.type == "cuda":
            # Only its shape and layout matter: cuDNN chooses kernels by them.
            input_ = torch.empty(shape, dtype=own.dtype, device=own.device, memory_format=torch.channels_last)
            options = (list(c.stride), list(padding), list(c.dilation), False, [0, 0], c.groups)
            wanted = [True, False, False]
            computed: Any = torch.ops.aten.convolution_backward(gradient, input_, own, None, *options, wanted)
            return computed[0]  # type: ignore[no-any-return]
        found: Tensor = input_gradient(shape, own, gradient, c.stride, padding, c.dilation, c.groups)
        return found

    return backward


def _make_transposed_input_backward(
    convolution: Any,
    weight: Tensor,
    transposed_padding: tuple[int, ...],
    geometry_per_axis: Sequence[AxisGeometry],
) -> Callable[[Tensor], Tensor]:
    """Return the input gradient as a forward convolution with the transposed kernel.

    It is the faster one on a CPU with stride 1, and for depthwise convolutions also over gradients that are
    spread out with zeros.
    """
    c = convolution

    @cache
    def transposed() -> Callable[[Tensor], Tensor]:
        turned = weight.flip(2, 3) if _is_depthwise(c) else weight.flip(2, 3).transpose(0, 1)
        turned = turned.contiguous(memory_format=torch.channels_last)
        return _make_conv_and_clip(turned, None, (1, 1), transposed_padding, (1, 1), c.groups, None)

    height, width = (side + 2 * pixels - extent + 1 for side, pixels, extent, _, _ in geometry_per_axis)

    def backward(gradient: Tensor) -> Tensor:
        if c.stride == (1, 1):
            return transposed()(gradient)
        spread = gradient.new_zeros(len(gradient), height, width, gradient.shape[1]).permute(0, 3, 1, 2)
        spread[:, :, :: c.stride[0], :: c.stride[1]] = gradient
        return transposed()(spread)

    return backward


def _make_strided_input_backward(
    weight: Tensor, stride: int, padding: tuple[int, ...], input_size: HeightWidth
) -> Callable[[Tensor], Tensor]:
    """Return the input gradient of a strided convolution as one with a channel for each offset in a stride.

    Pixels ``r`` beyond a multiple of the stride s meet only the weights ``r, r + s, r + 2 s, ...``:
    ``d[s q + r] = sum_j w[s j + r] g[q - j]``.
    """
    out, channels, *kernel = weight.shape
    reach = max(math.ceil(side / stride) for side in kernel)

    @cache
    def transposed() -> Callable[[Tensor], Tensor]:
        padded = nn.functional.pad(weight, (0, reach * stride - kernel[1], 0, reach * stride - kernel[0]))
        offsets = padded.view(out, channels, reach, stride, reach, stride).permute(1, 3, 5, 0, 2, 4)
        turned = offsets.reshape(channels * stride**2, out, reach, reach).flip(2, 3)
        turned = turned.contiguous(memory_format=torch.channels_last)
        return _make_conv_and_clip(turned, None, (1, 1), (reach - 1, reach - 1), (1, 1), 1, None)

    def backward(gradient: Tensor) -> Tensor:
        found = nn.functional.pixel_shuffle(transposed()(gradient), stride)
        # Pixels beyond the last window contribute to no output.
        below, right = (
            max(0, pixels + side - have)
            for pixels, side, have in zip(padding, input_size, found.shape[2:], strict=True)
        )
        if below or right:
            found = nn.functional.pad(found, (0, right, 0, below))
        top, left = padding
        return found[:, :, top : top + input_size[0], left : left + input_size[1]]

    return backward


def _is_depthwise(convolution: Any) -> bool:
    return bool(convolution.groups == convolution.in_channels == convolution.out_channels)


def _suits_onednn(convolution: Any) -> bool:
    """Return whether oneDNN's fast kernels apply: no dilation, float32, on a CPU."""
    return can_prepack_weight(convolution.weight) and convolution.dilation == (1, 1)


def can_prepack_weight(weight: Tensor) -> bool:
    """Return whether a weight can be packed in advance: float32 on a CPU, outside autocast."""
    onednn: Any = torch.backends.mkldnn
    plain = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    known = onednn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return plain and weight.device.type == "cpu" and bool(known)


def _make_conv_and_clip(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    clip_bounds: ClipBounds | None,
) -> Callable[[Tensor], Tensor]:
    """Return a function that convolves and clips."""
    # oneDNN's packed form of dilated kernels has crashed on inputs that are smaller than the kernel.
    if not can_prepack_weight(weight) or dilation != (1, 1):

        def convolve(images: Tensor) -> Tensor:
            output = nn.functional.conv2d(images, weight, bias, stride, padding, dilation, groups)
            return output if clip_bounds is None else output.clamp_(*clip_bounds)

        return convolve

    onednn: Any = torch.ops.mkldnn
    convolve_and_clip: Any = onednn._convolution_pointwise.default
    geometry = (list(padding), list(stride), list(dilation), groups)
    packed = onednn._reorder_convolution_weight(weight, *geometry)
    activation: tuple[str, list[float | None], str] = ("none", [], "")
    if clip_bounds is not None:
        activation = ("relu", [], "") if clip_bounds == (0.0, None) else ("hardtanh", list(clip_bounds), "")

    def convolve_packed(images: Tensor) -> Tensor:
        output: Tensor = convolve_and_clip(images, packed, bias, *geometry, *activation)
        return output

    return convolve_packed
