"""A model's forward pass as one function: going through blocks, and what in them does nothing, takes time."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

Stays = Callable[[nn.Module], bool]
"""Whether a layer is called as it is."""

_ONE_AT_A_TIME = threading.Lock()
"""To see what is called, `torch.fx` changes how every module of the process is called for a moment."""


class _Writing(fx.Tracer):
    def __init__(self, stays: Stays) -> None:
        super().__init__()
        self._stays = stays

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._stays(m) or super().is_leaf_module(m, module_qualified_name)


def written_out(model: nn.Module, stays: Stays) -> nn.Module:
    """Write out what a model does as one function. Meanwhile no other thread may call a model.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    stays : callable
        Which layers are called as they are, besides those of torch.

    Returns
    -------
    nn.Module
        With the same layers; hooks of others are not in it.

    Raises
    ------
    Exception
        Of a kind that depends on the model, if what it does depends on values.
    """
    with _ONE_AT_A_TIME:
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
        In evaluation mode, no parameter taking a gradient.
    example : Tensor
        An input of the size that the model will be given.
    stays : callable
        Which layers are called as they are, besides those of torch.
    """
    if example.device.type != "cpu":
        return model
    try:
        line = written_out(model, stays)
        return line if _is_same(model, line, example) else model
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError, NameError, AssertionError):
        return model


def steps(found: Tensor) -> list[Any]:
    """Return the steps by which a gradient goes back from a tensor, each once."""
    root = found.grad_fn
    waiting, seen = [root], {root}
    for step in waiting:
        for before, _ in step.next_functions if step is not None else ():
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return waiting


def _is_same(model: nn.Module, line: nn.Module, example: Tensor) -> bool:
    """Compare outputs, their gradient, and the steps to it: what is not written out shows in one of them."""
    batch = torch.cat([example, example.flip(-1)])
    with torch.no_grad():
        if not torch.equal(model(batch), line(batch)):
            return False
    answers = []
    for one in (model, line):
        images = batch.detach().clone().requires_grad_()
        found = one(images)
        kinds = Counter(type(step).__name__ for step in steps(found))
        answers.append((found.detach(), *torch.autograd.grad(found.float().square().sum(), images), kinds))
    (found, gradient, kinds), (other, pulled, others) = answers
    return torch.equal(found, other) and torch.equal(gradient, pulled) and kinds == others
