"""Backbones compiled by ``torch.compile``: what lies between matrix products becomes a few fused kernels."""

import copy
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from sfm.backbones.agreement import agree

MOST_OF_IT = 0.75
"""Of a model's weights: where repeated blocks hold as many, the rest is not worth compiling."""


def can_compile(device: torch.device) -> bool:
    """Say whether there is what compiling for a GPU takes: Triton, which knows the GPU, and a C compiler."""
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return device.type == "cuda" and bool(has_triton()) and any(shutil.which(c) for c in compilers if c)


def compiled(model: nn.Module, example: Tensor) -> nn.Module | None:
    """Return a compiled copy of a model that shares its weights.

    Blocks that are repeated are compiled once, for all of them: in seconds, where the whole takes a minute.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, no parameter taking a gradient; left as it is.
    example : Tensor
        Images as it will be fed with, as many as well: it is compiled for this shape.

    Returns
    -------
    nn.Module or None
        None if it does not give what the model gives, but for rounding.

    Raises
    ------
    RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError
        If it cannot be compiled.
    """
    # What was compiled before counts towards a limit, beyond which nothing is and nobody is told.
    torch.compiler.reset()
    weights: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, weights)
    for region in repeated(twin) or [twin]:
        region.compile(dynamic=False)
    mixed = any(tensor.dtype == torch.bfloat16 for tensor in model.parameters())
    return twin if agree(model, twin, example, coarse=mixed) else None


def repeated(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model consists of for the most part, if they are all alike."""
    for blocks in sorted(_alike(model), key=_size, reverse=True):
        if _size(blocks) >= MOST_OF_IT * _size([model]):
            return blocks
    return []


def _alike(model: nn.Module) -> Iterator[list[nn.Module]]:
    for container in model.modules():
        blocks = list(container.children())
        if isinstance(container, nn.Sequential | nn.ModuleList) and len(blocks) > 1:
            forms = {(type(block), tuple(p.shape for p in block.parameters())) for block in blocks}
            if len(forms) == 1:
                yield blocks


def _size(modules: list[nn.Module]) -> int:
    return sum(tensor.numel() for module in modules for tensor in module.parameters())
