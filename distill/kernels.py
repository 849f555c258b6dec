"""How the backbone is computed in every step: layer by layer, compiled, recorded."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sfm.backbones.arithmetic import same_bits
from sfm.backbones.build import Backbone
from sfm.backbones.captured import Captured
from sfm.backbones.checkpoint import first_line
from sfm.backbones.compiled import can_compile, compiled
from sfm.backbones.frozen import frozen
from sfm.distill.engine import Plan
from sfm.distill.group import ALONE, Group
from sfm.errors import InputError

Wish = Literal["auto", "yes", "no"]

COMPILE_FROM = 100_000
"""Views in all steps together from which on a GPU has gained what compiling costs."""

CANNOT = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)
"""What compiling and recording raise depends on what stands in their way."""


@dataclass(frozen=True)
class Kernels:
    """What is done about a backbone's kernels; a resumed run must do the same.

    Attributes
    ----------
    compiled : bool
        By ``torch.compile``, see :mod:`sfm.backbones.compiled`.
    captured : bool
        Recorded as CUDA graphs, see :mod:`sfm.backbones.captured`.
    """

    compiled: bool = False
    captured: bool = False


@contextmanager
def repeating(backbone: Backbone) -> Iterator[bool]:
    """Have the same computed with the same bits for a while, if the backbone can; say whether it can."""
    size = backbone.card.preprocessing.input_size
    can = True
    if backbone.device.type == "cuda":
        image = torch.zeros(1, 3, size, size, device=backbone.device, requires_grad=True)
        try:
            with same_bits(backbone.device):
                torch.autograd.grad(backbone.features(image).sum(), image)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            can = False
    if can:
        with same_bits(backbone.device):
            yield True
    else:
        yield False


def is_worth_compiling(plan: Plan, wish: Wish, device: torch.device) -> bool:
    """Say whether to compile.

    Raises
    ------
    InputError
        If it is asked for where it cannot be.
    """
    if wish == "auto":
        return can_compile(device) and plan.steps * plan.images * plan.views >= COMPILE_FROM
    if wish == "yes" and device.type != "cuda" and not shutil.which("c++"):
        raise InputError("--compile yes needs a C++ compiler, and finds none: install g++, or leave it out")
    if wish == "yes" and device.type == "cuda" and not can_compile(device):
        raise InputError(
            "--compile yes needs Triton for this GPU, and a C compiler: install them, or leave it out"
        )
    return wish == "yes"


def quickened(backbone: Backbone, plan: Plan, wish: Wish, group: Group = ALONE) -> tuple[Backbone, Kernels]:
    """Return a backbone that computes the same in less time or memory, and how.

    Parameters
    ----------
    backbone : Backbone
        In its precision; left as it is.
    plan : Plan
        Its micro-batch is what compiled and recorded kernels are made for.
    wish : {"auto", "yes", "no"}
        Whether to compile.
    group : Group
        Processes that compute together are not recorded: what they exchange cannot be.

    Raises
    ------
    InputError
        If it is to be compiled and cannot be.
    """
    size, device = backbone.card.preprocessing.input_size, backbone.device
    views = plan.micro_batch * plan.views
    example = torch.rand(views, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    example = example.to(device).contiguous(memory_format=backbone._layout)
    model = None
    if is_worth_compiling(plan, wish, device):
        try:
            model = compiled(backbone.model, example)
        except CANNOT as error:
            if wish == "yes":
                raise InputError(f"the backbone cannot be compiled: {first_line(error)}") from error
        if model is None and wish == "yes":
            raise InputError("the compiled backbone gives other features: leave out --compile yes")
    kernels = Kernels(compiled=model is not None)
    quick = frozen(backbone) if model is None else replace(backbone, model=model)
    if device.type != "cuda" or group.size > 1 or plan.graphs > plan.micro_batch:
        return quick, kernels
    try:
        return replace(quick, model=Captured(quick.model, example)), replace(kernels, captured=True)
    except CANNOT:
        # A model that looks at its values on the way cannot be recorded, and works all the same.
        return quick, kernels


def held_bytes(backbone: Backbone) -> int:
    """Return the GPU memory that recorded kernels keep, which torch does not count as allocated."""
    return backbone.model.held_bytes if isinstance(backbone.model, Captured) else 0
