"""Trace a model into one `fx.GraphModule` to cut Python overhead on a CPU."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from sfm.text import summarize_error

IsLeaf = Callable[[nn.Module], bool]
"""Returns whether a layer is called as it is, not traced into."""

_TRACE_LOCK = threading.Lock()
"""While it traces, `torch.fx` patches how every module of the process is called."""

logger = logging.getLogger(__name__)


class _LeafTracer(fx.Tracer):
    def __init__(self, is_leaf: IsLeaf) -> None:
        super().__init__()
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, is_leaf: IsLeaf) -> nn.Module:
    """Trace a model into one function. No other thread may call a model meanwhile.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    is_leaf : callable
        Which layers are called as they are, besides those of torch.

    Returns
    -------
    nn.Module
        With the same layers, but without hooks on others.

    Raises
    ------
    Exception
        Of a kind that depends on the model, if its control flow depends on values.
    """
    with _TRACE_LOCK:
        graph = _LeafTracer(is_leaf).trace(model)
    for node in graph.nodes:
        if node.op == "call_module" and type(model.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return fx.GraphModule(model, graph)


def trace_or_eager(model: nn.Module, example: Tensor, is_leaf: IsLeaf) -> nn.Module:
    """Return the traced model if it gives the same bits, else `model` itself, with the reason logged.

    Small layers on a few images gain: Python takes longer to find the next layer than a CPU to compute one.
    On a GPU `model` is returned: CUDA graphs have no such overhead
    (:mod:`sfm.backbones.execution.cuda_graphs`).

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, no parameter taking a gradient.
    example : Tensor
        An input of the size that the model will be given.
    is_leaf : callable
        Which layers are called as they are, besides those of torch.
    """
    if example.device.type != "cpu":
        return model
    try:
        traced = trace(model, is_leaf)
        if _give_same_bits(model, traced, example):
            return traced
        reason = "the traced model gives other bits"
    except (
        RuntimeError,
        AttributeError,
        TypeError,
        ValueError,
        LookupError,
        NameError,
        AssertionError,
    ) as error:
        reason = f"{type(error).__name__}: {summarize_error(error)}"
    logger.warning("the backbone is not traced: %s", reason)
    return model


def collect_autograd_nodes(output: Tensor) -> list[Any]:
    """Return all nodes of the autograd graph of a tensor, each once."""
    root = output.grad_fn
    nodes, seen = [root], {root}
    for node in nodes:
        for parent, _ in node.next_functions if node is not None else ():
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return nodes


def _give_same_bits(model: nn.Module, traced: nn.Module, example: Tensor) -> bool:
    """Compare outputs, gradients and kinds of autograd nodes: what tracing loses shows in one of them."""
    batch = torch.cat([example, example.flip(-1)])
    with torch.no_grad():
        if not torch.equal(model(batch), traced(batch)):
            return False
    outputs, gradients, kinds = [], [], []
    for candidate in (model, traced):
        images = batch.detach().clone().requires_grad_()
        output = candidate(images)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output.float().square().sum(), images)[0])
        kinds.append(Counter(type(node).__name__ for node in collect_autograd_nodes(output)))
    return torch.equal(*outputs) and torch.equal(*gradients) and kinds[0] == kinds[1]
