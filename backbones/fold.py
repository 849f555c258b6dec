"""Batch norms folded into the convolutions before them: fewer passes over memory, the same function."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold every batch norm that directly follows a convolution into it.

    With frozen statistics, a batch norm is an affine map per channel, so
    ``norm(w * x + b) = (g w / s) * x + (b - m) g / s + h`` with its mean m, standard deviation s, gain g and
    shift h.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; left as it is.
    example : Tensor
        An input that the model takes. What follows what is seen by running the model on it.

    Returns
    -------
    nn.Module
        A folded copy, or `model` itself where folding changes its output on `example` by more than rounding
        (a convolution whose output is also used elsewhere, or that derives its kernel from its weights).
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    pairs = in_turn(model, example, lambda module: isinstance(module, nn.Conv2d), _is_norm)
    folded = copy.deepcopy(model)
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest.eval())
    with torch.no_grad():
        before, after = model(example), folded(example)
    if not before.isfinite().all():
        # Weights that overflow: nothing says whether the two agree, and who uses the features refuses them.
        return model
    same = torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    return folded if same else model


def in_turn(
    model: nn.Module,
    example: Tensor,
    first: Callable[[nn.Module], bool],
    second: Callable[[nn.Module], bool],
) -> list[tuple[str, str]]:
    """Name the modules that follow each other directly, each called once.

    Parameters
    ----------
    model : nn.Module
    example : Tensor
        An input that the model takes; what follows what is seen by running the model on it.
    first, second : callable
        Which modules to look at: those whose output enters, as it is, one of the others.

    Returns
    -------
    list of (str, str)
    """
    made: list[tuple[str, Tensor]] = []
    taken: list[tuple[str, Tensor]] = []
    hooks = []
    for name, module in model.named_modules():
        if first(module):
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: made.append((name, out)))
            )
        elif second(module):
            hooks.append(
                module.register_forward_pre_hook(lambda _m, args, name=name: taken.append((name, args[0])))
            )
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(name for name, _ in made + taken)
    source = {id(tensor): name for name, tensor in made}
    pairs = [(source[id(tensor)], name) for name, tensor in taken if id(tensor) in source]
    return [(one, other) for one, other in pairs if calls[one] == calls[other] == 1]


def _is_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_mean is not None
