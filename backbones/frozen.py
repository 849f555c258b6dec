"""Frozen convolutional layers that answer for their input alone: nothing is kept for gradients of weights.

What autograd keeps of a convolution is its input, and of a clipped activation its output: four bytes per
value, although the gradient with respect to the input of a frozen convolution needs neither, and that of the
activation only which values were not clipped. So here a convolution keeps nothing and an activation one byte
per value. On a CPU, weights are laid out once for oneDNN as its kernels want them, not in every pass, and the
way back is a convolution forward with the transposed kernel wherever that is the faster one.
"""

import copy
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding, pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from sfm.backbones.agreement import agree
from sfm.backbones.build import Backbone
from sfm.backbones.fold import in_turn
from sfm.backbones.straight import steps, straight

Clip = tuple[float, float | None]
"""Least and largest value of an activation; None: there is no largest."""

BACK_BYTES = 5 * 2**20
"""So large are tensors on the way back through a row of convolutions, which goes a few images at a time."""

PIECE_BYTES = 3 * 2**20
"""What is derived of larger tensors on the way is made piece by piece, or it would be as large again."""

FEW_CHANNELS = 4
"""As images have, and hidden layers do not."""


def frozen(backbone: Backbone) -> Backbone:
    """Return a backbone whose layers answer for their input alone; see :func:`answer_for_input_alone`.

    Parameters
    ----------
    backbone : Backbone
        As it is to be used, on its device and in its precision; left as it is.
    """
    size = backbone.card.preprocessing.input_size
    example = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    example = example.to(backbone.device).contiguous(memory_format=backbone._layout)
    return replace(backbone, model=answer_for_input_alone(backbone.model, example))


def for_features(backbone: Backbone) -> Backbone:
    """Return a backbone that gives the same features, but for rounding, as soon as can be.

    On a CPU that is :func:`frozen`: weights that are laid out in advance, and sums clipped as they are made,
    are worth a fifth of the time. A GPU gains nothing by it.
    """
    if backbone.device.type != "cpu":
        return backbone
    quick = frozen(backbone)
    for module in quick.model.modules():
        if isinstance(module, FrozenConvolutions):
            module.forget()
    return quick


def answer_for_input_alone(model: nn.Module, example: Tensor) -> nn.Module:
    """Have a model's convolutions and clipped activations keep no more than the gradient of its input needs.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, no parameter taking a gradient; left as it is. Where it is, it must stay.
    example : Tensor
        An input of the size that the model will be given. What follows what is seen by running the model
        on it.

    Returns
    -------
    nn.Module
        A copy that shares the weights, in a :class:`Carrying`; or `model` itself where there is nothing to
        gain, or where its output or the gradient on `example` comes out different by more than rounding.
    """
    if sum(map(_is_plain, model.modules())) < 2:
        return model
    followed = dict(in_turn(model, example, _is_plain, lambda module: _clip_of(module) is not None))
    for join in (True, False):
        # A model may look at its convolutions, or at what one of them gives to the next, in ways that no
        # graph tells. Then the copy fails, or gives something else.
        try:
            changed = one_by_one(model, followed)
            whole = Carrying(joined(changed, example) if join else changed)
            if agree(model, whole, example):
                return Carrying(straight(whole.model, example, _stays))
        except (RuntimeError, AttributeError, TypeError, ValueError, LookupError):
            continue
    return model


def one_by_one(model: nn.Module, followed: Mapping[str, str]) -> nn.Module:
    """Return a copy of a model, with the same weights, whose convolutions are :class:`FrozenConvolutions`.

    Parameters
    ----------
    model : nn.Module
    followed : mapping of str to str
        The activations that follow convolutions directly.
    """
    weights: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, weights)
    for name, module in model.named_modules():
        if not _is_plain(module):
            continue
        activation = followed.get(name)
        clip = None if activation is None else _clip_of(changed.get_submodule(activation))
        changed.set_submodule(name, FrozenConvolutions([(module, clip)]))
        if activation is not None:
            changed.set_submodule(activation, nn.Identity())
    for name, module in list(changed.named_modules()):
        if (clip := _clip_of(module)) is not None:
            changed.set_submodule(name, FrozenClip(clip))
    return changed


def joined(model: nn.Module, example: Tensor) -> nn.Module:
    """Join convolutions of which each takes what the one before gives, and nothing else takes it.

    Parameters
    ----------
    model : nn.Module
        With convolutions that are :class:`FrozenConvolutions`; changed.
    example : Tensor
        An input that the model takes; what takes what is seen by running the model on it.

    Returns
    -------
    nn.Module
        The model.
    """
    made: dict[str, list[Any]] = {}
    taken: dict[str, list[Any]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenConvolutions):

            def note(_module: nn.Module, given: Any, found: Any, name: str = name) -> None:
                taken.setdefault(name, []).append(given[0].grad_fn)
                made.setdefault(name, []).append(found.grad_fn)

            hooks.append(module.register_forward_hook(note))
    found = model(example.detach().clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    uses = Counter(before for step in steps(found) for before, _ in step.next_functions)
    maker = {nodes[0]: name for name, nodes in made.items() if len(nodes) == 1 and uses[nodes[0]] == 1}
    before = {name: maker[nodes[0]] for name, nodes in taken.items() if len(nodes) == 1 and nodes[0] in maker}
    first: dict[str, str] = {}
    for name in made:
        if name in before:
            first[name] = first.get(before[name], before[name])
            row: Any = model.get_submodule(first[name])
            last: Any = model.get_submodule(name)
            model.set_submodule(first[name], FrozenConvolutions([*row.links, *last.links]))
            model.set_submodule(name, nn.Identity())
    return model


class Carrying(nn.Module):
    """A model that carries what is not a number from its input to its output, past layers that clip it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to features, as the model does."""
        feature: Tensor = self.model(images)
        return feature + 0 * images.detach().sum(dim=(1, 2, 3)).to(feature.dtype)[:, None]


class FrozenConvolutions(nn.Module):
    """Convolutions with frozen weights, each with the clipped activation after it if there is one, in turn.

    Parameters
    ----------
    links : sequence of (nn.Conv2d, (float, float or None) or None)
        The convolutions, padded with zeros, or `Conv2dSame` of timm's; and the bounds of their activations.
    """

    def __init__(self, links: Sequence[tuple[nn.Conv2d, Clip | None]]) -> None:
        super().__init__()
        self.links = list(links)
        self.convolutions = nn.ModuleList(convolution for convolution, _ in links)
        self._ways: dict[torch.Size, tuple[_Ways, ...]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channel, y, x) as the convolutions and their activations do."""
        ways = self._ways.get(images.shape[2:])
        if ways is None:
            ways = self._ways[images.shape[2:]] = tuple(self._chosen(images.shape[2:]))
        if torch.is_grad_enabled() and images.requires_grad:
            found: Tensor = _Convolve.apply(images, ways)
            return found
        for way in ways:
            images = way.forth(images)
        return images

    def forget(self) -> None:
        """Drop how weights were laid out: what is needed will be laid out again."""
        self._ways.clear()

    def _chosen(self, size: torch.Size) -> Iterator["_Ways"]:
        for convolution, clip in self.links:
            yield (way := _ways(convolution, size, clip))
            size = way.size


class FrozenClip(nn.Module):
    """A clipped activation that keeps one byte per value.

    Parameters
    ----------
    clip : (float, float or None)
        Bounds.
    """

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, values: Tensor) -> Tensor:
        """Clip values."""
        found: Tensor = _ClipValues.apply(values, self.clip)
        return found


@dataclass(frozen=True)
class _Ways:
    """The way forth through a convolution and its activation, and the way back through the convolution.

    The way back takes the gradient with respect to the sums; weights are laid out for it when it is first
    gone. The size is that of what comes out.
    """

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    clip: Clip | None
    size: torch.Size


def _ways(convolution: Any, size: torch.Size, clip: Clip | None) -> _Ways:
    """Choose the ways through a convolution for images of a size, height and width."""
    c = convolution
    if not isinstance(c, Conv2dSame):
        return _padded_ways(c, size, tuple(c.padding), c.weight, clip)
    sides = zip(size, c.kernel_size, c.stride, c.dilation, strict=True)
    missing = [get_same_padding(*side) for side in sides]
    if all(pixels % 2 == 0 for pixels in missing):
        return _padded_ways(c, size, tuple(pixels // 2 for pixels in missing), c.weight, clip)
    if all(pixels % 2 for pixels in missing) and _is_depthwise(c) and _suits_onednn(c):
        # With a row and a column of zeros before it, a kernel lies evenly: no image has to be copied into a
        # larger one.
        wider = nn.functional.pad(c.weight, (1, 0, 1, 0)).contiguous(memory_format=torch.channels_last)
        return _padded_ways(c, size, tuple(pixels // 2 + 1 for pixels in missing), wider, clip)
    whole = torch.Size(side + pixels for side, pixels in zip(size, missing, strict=True))
    within = _padded_ways(c, whole, (0, 0), c.weight, clip)
    top, left = (pixels // 2 for pixels in missing)

    def forth(images: Tensor) -> Tensor:
        return within.forth(pad_same(images, list(c.kernel_size), list(c.stride), list(c.dilation)))

    def back(gradient: Tensor) -> Tensor:
        found = within.back(gradient)
        return found[:, :, top : top + size[0], left : left + size[1]]

    return _Ways(forth, back, clip, within.size)


def _padded_ways(
    convolution: Any, size: torch.Size, padding: tuple[int, ...], weight: Tensor, clip: Clip | None
) -> _Ways:
    """Choose the ways through a convolution that pads by itself, evenly, for kernels in place of its own."""
    c, kernel = convolution, weight.shape[2:]
    forth = _kernel(weight, c.bias, c.stride, padding, c.dilation, c.groups, clip)
    sides = list(zip(size, padding, kernel, c.stride, c.dilation, strict=True))
    out = torch.Size(
        (side + 2 * pixels - far * (own - 1) - 1) // step + 1 for side, pixels, own, step, far in sides
    )
    reach = tuple(side - 1 - pixels for side, pixels in zip(kernel, padding, strict=True))

    pulled_back: Any = conv2d_input

    def back(gradient: Tensor) -> Tensor:
        own, shape = weight.to(gradient.dtype), (len(gradient), c.in_channels, *size)
        if gradient.device.type == "cuda":
            # Of the images it looks only at shape and layout, by which cuDNN chooses its kernels.
            like = torch.empty(shape, dtype=own.dtype, device=own.device, memory_format=torch.channels_last)
            given = (list(c.stride), list(padding), list(c.dilation), False, [0, 0], c.groups)
            wanted = [True, False, False]
            pulled: Any = torch.ops.aten.convolution_backward(gradient, like, own, None, *given, wanted)
            return pulled[0]  # type: ignore[no-any-return]
        found: Tensor = pulled_back(shape, own, gradient, c.stride, padding, c.dilation, c.groups)
        return found

    # On a CPU a convolution forward, of the transposed kernel, is the faster way back: with stride 1, for one
    # channel at a time even over gradients that are set apart by zeros, and for images of few channels.
    depthwise, slow = _is_depthwise(c), not _suits_onednn(c) or min(reach) < 0
    if not slow and c.groups == 1 and c.stride[0] == c.stride[1] > 1 and c.in_channels <= FEW_CHANNELS:
        return _Ways(forth, _between_pixels(weight, c.stride[0], padding, size), clip, out)
    if slow or not (depthwise or (c.groups == 1 and c.stride == (1, 1))):
        return _Ways(forth, back, clip, out)

    @cache
    def across() -> Callable[[Tensor], Tensor]:
        turned = weight.flip(2, 3) if depthwise else weight.flip(2, 3).transpose(0, 1)
        turned = turned.contiguous(memory_format=torch.channels_last)
        return _kernel(turned, None, (1, 1), reach, (1, 1), c.groups, None)

    height, width = (side + 2 * pixels - own + 1 for side, pixels, own, _, _ in sides)

    def forward_back(gradient: Tensor) -> Tensor:
        if c.stride == (1, 1):
            return across()(gradient)
        apart = gradient.new_zeros(len(gradient), height, width, gradient.shape[1]).permute(0, 3, 1, 2)
        apart[:, :, :: c.stride[0], :: c.stride[1]] = gradient
        return across()(apart)

    return _Ways(forth, forward_back, clip, out)


def _between_pixels(
    weight: Tensor, stride: int, padding: tuple[int, ...], size: torch.Size
) -> Callable[[Tensor], Tensor]:
    """Return the way back through a convolution with a stride, as one with a channel for every place in it.

    Pixels that are ``r`` beyond a multiple of the stride s meet the weights ``r, r + s, r + 2 s, ...`` only:
    ``d[s q + r] = sum_j w[s j + r] g[q - j]``.
    """
    out, channels, *kernel = weight.shape
    reach = max(math.ceil(side / stride) for side in kernel)

    @cache
    def across() -> Callable[[Tensor], Tensor]:
        whole = nn.functional.pad(weight, (0, reach * stride - kernel[1], 0, reach * stride - kernel[0]))
        places = whole.view(out, channels, reach, stride, reach, stride).permute(1, 3, 5, 0, 2, 4)
        turned = places.reshape(channels * stride**2, out, reach, reach).flip(2, 3)
        turned = turned.contiguous(memory_format=torch.channels_last)
        return _kernel(turned, None, (1, 1), (reach - 1, reach - 1), (1, 1), 1, None)

    def back(gradient: Tensor) -> Tensor:
        found = nn.functional.pixel_shuffle(across()(gradient), stride)
        # Pixels beyond the last window are missing: no sum has them.
        below, right = (
            max(0, pixels + side - have)
            for pixels, side, have in zip(padding, size, found.shape[2:], strict=True)
        )
        if below or right:
            found = nn.functional.pad(found, (0, right, 0, below))
        top, left = padding
        return found[:, :, top : top + size[0], left : left + size[1]]

    return back


class _Convolve(torch.autograd.Function):
    """Convolve and clip in turn; of what is in between, only which values were not clipped is kept."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, ways: Sequence[_Ways]) -> Tensor:
        inside, largest = [], images.nbytes
        for way in ways:
            images = way.forth(images)
            inside.append(None if way.clip is None else _inside(images, way.clip).view(torch.int8))
            largest = max(largest, images.nbytes)
        ctx.save_for_backward(*inside)
        ctx.ways, ctx.largest = ways, largest
        ctx.channels_last = images.is_contiguous(memory_format=torch.channels_last)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ways, masks, count = ctx.ways, ctx.saved_tensors, len(gradient)
        if ctx.channels_last:
            # That of a mean over places comes in another layout.
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        each = count
        if count > 1 and len(ways) > 1 and gradient.device.type != "cuda":
            each = _at_a_time(count, ctx.largest)
        if each == count:
            return _back(gradient, ways, masks), None
        found = [
            _back(piece, ways, [None if mask is None else mask[start : start + each] for mask in masks])
            for start, piece in zip(range(0, count, each), torch.split(gradient, each), strict=True)
        ]
        return torch.cat(found), None


def _at_a_time(count: int, largest: int) -> int:
    """Return how many images go back together, so that what is made of them on the way stays in the cache.

    Parameters
    ----------
    count : int
        How many there are.
    largest : int
        Bytes of the largest tensor that is made of all of them.
    """
    most = max(1, BACK_BYTES * count // largest)
    return math.ceil(count / math.ceil(count / most))


def _back(gradient: Tensor, ways: Sequence[_Ways], masks: Sequence[Tensor | None]) -> Tensor:
    """Take a gradient back through convolutions and what clips them, the last one first."""
    given = gradient
    for way, mask in zip(reversed(ways), reversed(masks), strict=True):
        if mask is not None:
            # What was made here is in the cache, and nobody else's.
            gradient = gradient * mask if gradient is given else gradient.mul_(mask)
        gradient = way.back(gradient)
    return gradient


class _ClipValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, clip: Clip) -> Tensor:
        found = values.clamp(*clip)
        ctx.save_for_backward(_inside(found, clip))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside.view(torch.int8), None


def _inside(clipped: Tensor, clip: Clip) -> Tensor:
    """Mark the values that are at no bound."""
    low, high = clip
    if high is None:
        return clipped.to(torch.bool) if low == 0 else clipped.ne(low)
    if low != 0 or clipped.device.type == "cuda":
        return clipped.ne(low).logical_and_(clipped.ne(high))
    # Zero at both bounds, and several times as quick as to compare.
    unclipped: Callable[..., Tensor] = torch.ops.aten.hardtanh_backward.default
    pieces = math.ceil(clipped.nbytes / PIECE_BYTES)
    if pieces <= 1:
        return unclipped(clipped, clipped, low, high).to(torch.bool)
    inside = torch.empty_like(clipped, dtype=torch.bool)
    each = math.ceil(len(clipped) / pieces)
    for given, found in zip(torch.split(clipped, each), torch.split(inside, each), strict=True):
        found.copy_(unclipped(given, given, low, high))
    return inside


def _is_depthwise(convolution: Any) -> bool:
    return bool(convolution.groups == convolution.in_channels == convolution.out_channels)


def _suits_onednn(convolution: Any) -> bool:
    """Say whether the fast ways of oneDNN are open: kernels without holes, float32, on a CPU."""
    return _is_packed(convolution.weight) and convolution.dilation == (1, 1)


def _is_packed(weight: Tensor) -> bool:
    """Say whether weights can be laid out in advance: float32 on a CPU, if autocast leaves them that."""
    onednn: Any = torch.backends.mkldnn
    plain = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    known = onednn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return plain and weight.device.type == "cpu" and bool(known)


def _kernel(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    clip: Clip | None,
) -> Callable[[Tensor], Tensor]:
    """Return a function that convolves and clips."""
    # Of kernels with holes, oneDNN's packed form has crashed on maps that are smaller than they are.
    if not _is_packed(weight) or dilation != (1, 1):

        def convolve(images: Tensor) -> Tensor:
            found = nn.functional.conv2d(images, weight, bias, stride, padding, dilation, groups)
            return found if clip is None else found.clamp_(*clip)

        return convolve

    onednn: Any = torch.ops.mkldnn
    convolve_and_clip: Any = onednn._convolution_pointwise.default
    shape = (list(padding), list(stride), list(dilation), groups)
    packed = onednn._reorder_convolution_weight(weight, *shape)
    after: tuple[str, list[float | None], str] = ("none", [], "")
    if clip is not None:
        after = ("relu", [], "") if clip == (0.0, None) else ("hardtanh", list(clip), "")

    def convolve_packed(images: Tensor) -> Tensor:
        found: Tensor = convolve_and_clip(images, packed, bias, *shape, *after)
        return found

    return convolve_packed


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) in (nn.Conv2d, Conv2dSame)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not module.weight.requires_grad
    )


def _stays(module: nn.Module) -> bool:
    return isinstance(module, FrozenConvolutions | FrozenClip)


def _clip_of(module: Any) -> Clip | None:
    if type(module) is nn.ReLU:
        return (0.0, None)
    return (float(module.min_val), float(module.max_val)) if type(module) in (nn.ReLU6, nn.Hardtanh) else None
