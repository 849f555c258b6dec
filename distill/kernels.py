"""How the backbone is computed in every step: layer by layer, or recorded, or compiled and recorded."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sfm.backbones.arithmetic import same_bits
from sfm.backbones.build import Backbone
from sfm.backbones.captured import Captured
from sfm.backbones.compiled import can_compile, compiled
from sfm.backbones.frozen import frozen
from sfm.distill.engine import Plan
from sfm.distill.group import ALONE, Group
from sfm.errors import InputError
from sfm.text import summarize_error

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
    size, device = backbone.card.preprocessing.input_size, backbone.device
    can = True
    if device.type == "cuda":
        image = torch.zeros(1, 3, size, size, device=device, requires_grad=True)
        try:
            with same_bits(device):
                torch.autograd.grad(backbone.features(image).sum(), image)
                # A process that has used cuBLAS in another way cannot go back.
                image.detach()[0, 0] @ image.detach()[0, 0]
        except RuntimeError as error:
            if "deterministic" not in str(error).lower():
                raise
            can = False
    with same_bits(device) if can else nullcontext():
        yield can


def is_worth_compiling(wish: Wish, views: int, device: torch.device, group: Group = ALONE) -> bool:
    """Say whether to compile: what is compiled is recorded as well, which takes a GPU and one process.

    Parameters
    ----------
    wish : {"auto", "yes", "no"}
    views : int
        In all steps together.
    device : torch.device
    group : Group

    Raises
    ------
    InputError
        If it is asked for where it cannot be.
    """
    if wish == "yes" and (device.type != "cuda" or group.size > 1):
        raise InputError("--compile yes is for a run in one process on a GPU: leave it out")
    if wish == "yes" and not can_compile(device):
        raise InputError(
            "--compile yes needs Triton for this GPU, and a C compiler: install them, or leave it out"
        )
    can = group.size == 1 and can_compile(device)
    return can and (wish == "yes" or (wish == "auto" and views >= COMPILE_FROM))


def wanted_kernels(plan: Plan, wish: Wish, device: torch.device, group: Group = ALONE) -> Kernels:
    """Return what to do about the kernels of a new run.

    Processes that compute together are not recorded: what they exchange cannot be. Nor is a run that keeps
    several graphs: a recording has one.

    Raises
    ------
    InputError
        If it is to be compiled and cannot be.
    """
    one_graph = plan.graphs <= plan.micro_batch
    worth = is_worth_compiling(wish, plan.steps * plan.images * plan.views, device, group)
    if wish == "yes" and not one_graph:
        raise InputError("--compile yes keeps the graph of one micro-batch: lower --graphs, or leave it out")
    captured = device.type == "cuda" and group.size == 1 and one_graph
    return Kernels(compiled=captured and worth, captured=captured)


def quickened(backbone: Backbone, plan: Plan, wanted: Kernels) -> tuple[Backbone, Kernels, str | None]:
    """Return a backbone that computes the same in less time or memory.

    Parameters
    ----------
    backbone : Backbone
        In its precision; left as it is.
    plan : Plan
        Its micro-batch is what compiled and recorded kernels are made for.
    wanted : Kernels
        What is to be done; where it cannot, less is.

    Returns
    -------
    Backbone
    Kernels
        What was done.
    str or None
        What stood in the way of the rest.
    """
    if not wanted.captured:
        return frozen(backbone), Kernels(), None
    size, device = backbone.card.preprocessing.input_size, backbone.device
    views = plan.micro_batch * plan.views
    example = torch.rand(views, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    example = example.to(device).contiguous(memory_format=backbone._layout)
    obstacle = None
    if wanted.compiled:
        try:
            model = compiled(backbone.model, example)
            if model is not None:
                return replace(backbone, model=Captured(model, example)), wanted, None
            obstacle = "the compiled backbone gives other features"
        except CANNOT as error:
            obstacle = f"the backbone cannot be compiled: {summarize_error(error)}"
    lean = frozen(backbone)
    try:
        return replace(lean, model=Captured(lean.model, example)), Kernels(captured=True), obstacle
    except CANNOT as error:
        # A model that looks at its values on the way cannot be recorded, and works all the same.
        return lean, Kernels(), obstacle or f"the backbone cannot be recorded: {summarize_error(error)}"


def held_bytes(backbone: Backbone) -> int:
    """Return the GPU memory that recorded kernels keep, which torch does not count as allocated."""
    return backbone.model.held_bytes if isinstance(backbone.model, Captured) else 0
