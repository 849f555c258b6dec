"""Fold batch norms into convolutions: saves a third of a step and of the forward pass on a CPU.

Measured with lite0 (``python benchmarks/execution.py``).
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norms_if_equivalent(model: nn.Module, example_images: Tensor) -> nn.Module:
    """Fold every batch norm that directly follows a convolution into it.

    With frozen statistics, a batch norm is an affine map per channel, so
    ``norm(w * x + b) = (g w / s) * x + (b - m) g / s + h`` with its mean m, standard deviation s, gain g and
    shift h.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; left as it is.
    example_images : Tensor
        An input of the model, which is run on it to find out which module follows which.

    Returns
    -------
    nn.Module
        A folded copy, or `model` itself where folding changes its output on the examples beyond rounding
        (a convolution whose output is also used elsewhere, or that derives its kernel from its weights).
    """
    from timm.layers.norm_act import BatchNormAct2d  # slow to import

    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    pairs = find_consecutive_module_names(
        model, example_images, lambda module: isinstance(module, nn.Conv2d), _is_foldable_batch_norm
    )
    folded = copy.deepcopy(model)
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        remaining = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, remaining.eval())
    with torch.no_grad():
        before, after = model(example_images), folded(example_images)
    if not before.isfinite().all():
        # The weights overflow, so outputs cannot be compared; users of the features refuse such values.
        return model
    same = torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    return folded if same else model


def find_consecutive_module_names(
    model: nn.Module,
    example_images: Tensor,
    is_first: Callable[[nn.Module], bool],
    is_second: Callable[[nn.Module], bool],
) -> list[tuple[str, str]]:
    """Return names of pairs of modules, each called once, where the second takes the output of the first.

    Parameters
    ----------
    model : nn.Module
    example_images : Tensor
        An input of the model, which is run on it.
    is_first, is_second : callable
        Select the modules that may come first and those that may follow.

    Returns
    -------
    list of (str, str)
    """
    outputs: list[tuple[str, Tensor]] = []
    inputs: list[tuple[str, Tensor]] = []
    hooks = []
    for name, module in model.named_modules():
        if is_first(module):
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: outputs.append((name, out)))
            )
        elif is_second(module):
            hooks.append(
                module.register_forward_pre_hook(lambda _m, args, name=name: inputs.append((name, args[0])))
            )
    try:
        with torch.no_grad():
            model(example_images)
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(name for name, _ in outputs + inputs)
    source = {id(tensor): name for name, tensor in outputs}
    pairs = [(source[id(tensor)], name) for name, tensor in inputs if id(tensor) in source]
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _is_foldable_batch_norm(module: nn.Module) -> bool:
    from timm.layers.norm_act import BatchNormAct2d  # slow to import

    return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_mean is not None
