"""A model's forward pass as one function: going through blocks, and what in them does nothing, takes time."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

Stays = Callable[[nn.Module], bool]
"""Whether a layer is called as it is."""


class _Writing(fx.Tracer):
    def __init__(self, stays: Stays) -> None:
        super().__init__()
        self._stays = stays

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._stays(m) or super().is_leaf_module(m, module_qualified_name)


def written_out(model: nn.Module, stays: Stays) -> nn.Module:
    """Write out what a model does as one function.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    stays : callable
        Which layers are called as they are, besides those of torch.

    Returns
    -------
    nn.Module
        With the same layers.

    Raises
    ------
    Exception
        Of a kind that depends on the model, if what it does depends on values.
    """
    graph = _Writing(stays).trace(model)
    for node in graph.nodes:
        if node.op == "call_module" and type(model.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return fx.GraphModule(model, graph)


def straight(model: nn.Module, example: Tensor, stays: Stays) -> nn.Module:
    """Return a model that does the same to the bit, as one function; `model` itself where there is none.

    Small layers on a few images gain by it: a CPU has computed them before Python finds the next. On a GPU
    `model` stays: there the forward pass is recorded, see :mod:`sfm.backbones.captured`.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    example : Tensor
        An input of the size that the model will be given.
    stays : callable
        Which layers are called as they are, besides those of torch.
    """
    if example.device.type != "cpu":
        return model
    try:
        line = written_out(model, stays)
        # A function may have been written out wrongly: it knows nothing of `with autocast`.
        for images in (example, example.detach().clone().requires_grad_()):
            if not torch.equal(line(images), model(images)):
                return model
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError):
        return model
    return line
