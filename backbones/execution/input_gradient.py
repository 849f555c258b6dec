"""Replace a model's frozen convolutions by ones whose backward computes only the input gradient."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sfm.backbones.execution.agreement import outputs_and_gradients_agree
from sfm.backbones.execution.batch_norms import find_consecutive_module_names
from sfm.backbones.execution.conv_chains import fuse_conv_chains_in_place
from sfm.backbones.execution.conv_kernels import ClipBounds
from sfm.backbones.execution.input_grad_layers import InputGradClip, InputGradConvChain, NaNPropagating
from sfm.text import get_first_error_line

MIN_CONVOLUTIONS = 2
"""Minimum number of convolutions to replace; transformers have one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputGradAttempt:
    """What :func:`make_input_grad_model` returns.

    Attributes
    ----------
    model : nn.Module
        The changed copy, or the model itself.
    unchanged_reason : str or None
        Why the model itself is returned although it has convolutions.
    """

    model: nn.Module
    unchanged_reason: str | None = None


def make_input_grad_model(model: nn.Module, example_images: Tensor) -> InputGradAttempt:
    """Return a copy of a model whose backward computes, and keeps memory for, the input gradient only.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, no parameter taking a gradient, on its final device; left as it is.
    example_images : Tensor
        An input of the final size. The model is run on it to find out which module follows which.

    Returns
    -------
    InputGradAttempt
        The copy shares the weights and is a :class:`NaNPropagating`. It is `model` itself where there is
        nothing to gain, or where output or gradient on `example_images` differ by more than rounding.
    """
    if sum(map(is_frozen_zero_padded_conv, model.modules())) < MIN_CONVOLUTIONS:
        return InputGradAttempt(model)
    activations = dict(
        find_consecutive_module_names(
            model,
            example_images,
            is_frozen_zero_padded_conv,
            lambda module: get_activation_clip_bounds(module) is not None,
        )
    )
    problem = ""
    for fuse in (True, False):
        # A model may access its convolutions or their outputs in ways that the autograd graph does not show.
        # Then the copy fails or computes something else.
        try:
            changed = replace_convolutions(model, activations)
            candidate = NaNPropagating(
                fuse_conv_chains_in_place(changed, example_images) if fuse else changed
            )
            if outputs_and_gradients_agree(model, candidate, example_images):
                return InputGradAttempt(candidate)
            problem = "convolutions without weight gradients change features or gradients"
        except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
            problem = (
                f"convolutions cannot be replaced: {type(error).__name__}: {get_first_error_line(error)}"
            )
        if fuse:
            logger.warning("chains of convolutions are not fused: %s", problem)
    return InputGradAttempt(model, problem)


def replace_convolutions(model: nn.Module, activation_name_by_conv_name: Mapping[str, str]) -> nn.Module:
    """Return a copy of a model, with the same weights, whose convolutions are :class:`InputGradConvChain`.

    Parameters
    ----------
    model : nn.Module
    activation_name_by_conv_name : mapping of str to str
        Name of the activation that directly follows a convolution, by the convolution's name.
    """
    weights: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, weights)
    for name, module in model.named_modules():
        if not is_frozen_zero_padded_conv(module):
            continue
        activation = activation_name_by_conv_name.get(name)
        clip = None if activation is None else get_activation_clip_bounds(changed.get_submodule(activation))
        changed.set_submodule(name, InputGradConvChain([(module, clip)]))
        if activation is not None:
            changed.set_submodule(activation, nn.Identity())
    for name, module in list(changed.named_modules()):
        if (clip := get_activation_clip_bounds(module)) is not None:
            changed.set_submodule(name, InputGradClip(clip))
    return changed


def drop_packed_weights(model: nn.Module) -> None:
    """Free the packed weights of a model's convolutions; they are packed again when needed."""
    for module in model.modules():
        if isinstance(module, InputGradConvChain):
            module.drop_packed_weights()


def is_frozen_zero_padded_conv(module: Any) -> bool:
    """Return whether a module is a frozen 2d convolution, padded with zeros."""
    from timm.layers.conv2d_same import Conv2dSame  # slow to import

    return (
        type(module) in (nn.Conv2d, Conv2dSame)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not module.weight.requires_grad
    )


def get_activation_clip_bounds(module: Any) -> ClipBounds | None:
    """Return the bounds of a clipped activation, None for any other module."""
    if type(module) is nn.ReLU:
        return (0.0, None)
    return (float(module.min_val), float(module.max_val)) if type(module) in (nn.ReLU6, nn.Hardtanh) else None
