"""Compile a backbone with ``torch.compile``: ViT-B/14, 25 images: 10.3 ms, not 13.3 (docs/distillation.md).

Elementwise operations become a few fused kernels. Both times are with CUDA graphs, on an H100.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from sfm.backbones.execution.agreement import outputs_and_gradients_agree

MIN_REPEATED_SHARE = 0.75
"""Minimum share of the weights in repeated blocks to compile only these blocks."""


def can_compile_for(device: torch.device) -> bool:
    """Return whether a GPU can be compiled for: Triton supports it, and there is a C compiler."""
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return device.type == "cuda" and bool(has_triton()) and any(shutil.which(c) for c in compilers if c)


def compile_model_if_equivalent(model: nn.Module, example_images: Tensor) -> nn.Module | None:
    """Return a compiled copy of a model that shares its weights.

    Blocks that are repeated are compiled once for all of them: in seconds, where the whole model takes a
    minute.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, no parameter taking a gradient; left as it is.
    example_images : Tensor
        A batch; the model is compiled for its shape.

    Returns
    -------
    nn.Module or None
        None if the copy's output or gradient differs by more than rounding.

    Raises
    ------
    RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError
        If it cannot be compiled.
    """
    # Earlier compilations count towards a limit beyond which torch silently compiles nothing.
    torch.compiler.reset()
    weights: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    compiled = copy.deepcopy(model, weights)
    for region in find_dominant_repeated_blocks(compiled) or [compiled]:
        region.compile(dynamic=False)
    mixed = any(tensor.dtype == torch.bfloat16 for tensor in model.parameters())
    return (
        compiled
        if outputs_and_gradients_agree(model, compiled, example_images, allow_bfloat16_rounding=mixed)
        else None
    )


def find_dominant_repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model consists of for the most part, if they are all alike; else nothing."""
    for blocks in sorted(_iterate_uniform_block_lists(model), key=_count_parameters, reverse=True):
        if _count_parameters(blocks) >= MIN_REPEATED_SHARE * _count_parameters([model]):
            return blocks
    return []


def _iterate_uniform_block_lists(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the children of containers whose children all have the same type and shapes."""
    for container in model.modules():
        blocks = list(container.children())
        if isinstance(container, nn.Sequential | nn.ModuleList) and len(blocks) > 1:
            forms = {(type(block), tuple(p.shape for p in block.parameters())) for block in blocks}
            if len(forms) == 1:
                yield blocks


def _count_parameters(modules: list[nn.Module]) -> int:
    return sum(tensor.numel() for module in modules for tensor in module.parameters())
