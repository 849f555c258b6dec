"""Choose the execution mode of a run: from its options, its size, the device and the processes."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from sfm.backbones.execution.compilation import can_compile
from sfm.backbones.execution.modes import ExecutionMode, ExecutionOption
from sfm.backbones.execution.preparation import Prepared
from sfm.distill.engine import Plan
from sfm.distill.group import ALONE, Group
from sfm.errors import InputError

CompileOption = Literal["auto", "yes", "no"]

MIN_VIEWS_TO_COMPILE = 100_000
"""Views in all steps together from which on a GPU gains more than compiling costs."""


@dataclass(frozen=True)
class ExecutionChoice:
    """An execution mode and why it was chosen."""

    mode: ExecutionMode
    reason: str


def should_compile(
    compile_option: CompileOption, views: int, device: torch.device, group: Group = ALONE
) -> bool:
    """Return whether to compile; what is compiled is recorded as well, which takes a GPU and one process.

    Parameters
    ----------
    compile_option : {"auto", "yes", "no"}
    views : int
        In all steps together.
    device : torch.device
    group : Group

    Raises
    ------
    InputError
        If it is asked for where it cannot be.
    """
    if compile_option == "yes" and (device.type != "cuda" or group.size > 1):
        raise InputError("--compile yes is for a run in one process on a GPU: leave it out")
    if compile_option == "yes" and not can_compile(device):
        raise InputError(
            "--compile yes needs Triton for this GPU, and a C compiler: install them, or leave it out"
        )
    can = group.size == 1 and can_compile(device)
    return can and (compile_option == "yes" or (compile_option == "auto" and views >= MIN_VIEWS_TO_COMPILE))


def choose_execution(
    plan: Plan,
    option: ExecutionOption,
    compile_option: CompileOption,
    device: torch.device,
    group: Group = ALONE,
) -> ExecutionChoice:
    """Choose the execution mode of a new run.

    Processes that compute together are not recorded as CUDA graphs: their exchanges cannot be. Nor is a run
    that keeps several autograd graphs: a recording has one.

    Raises
    ------
    InputError
        If the options contradict each other, or the run is to be compiled and cannot be.
    """
    if option == "eager":
        if compile_option == "yes":
            raise InputError("--execution eager compiles nothing: leave out --compile yes")
        return ExecutionChoice("eager", "asked for")
    one_graph = plan.graphs <= plan.micro_batch
    worth = should_compile(compile_option, plan.steps * plan.images * plan.views, device, group)
    if compile_option == "yes" and not one_graph:
        raise InputError("--compile yes keeps the graph of one micro-batch: lower --graphs, or leave it out")
    if device.type != "cuda":
        return ExecutionChoice("input-grad", "on a CPU")
    if group.size > 1:
        return ExecutionChoice("input-grad", "several processes")
    if not one_graph:
        return ExecutionChoice("input-grad", "several graphs are kept")
    if worth:
        return ExecutionChoice("compiled", "asked for" if compile_option == "yes" else "a long run on a GPU")
    return ExecutionChoice("cuda-graph", "on a GPU")


def read_saved_execution(recipe: dict[str, Any], option: ExecutionOption) -> ExecutionChoice:
    """Return the execution mode that a saved run had, which a resumed one keeps.

    Raises
    ------
    InputError
        If it was not eager and is to be now.
    """
    saved = recipe.get("execution")
    if saved:
        choice = ExecutionChoice(saved["mode"], saved["reason"])
    elif recipe.get("captured"):
        choice = ExecutionChoice("compiled" if recipe.get("compiled") else "cuda-graph", "as the run began")
    else:
        choice = ExecutionChoice("input-grad", "as the run began")
    if option == "eager" and choice.mode != "eager":
        raise InputError(
            f"cannot resume the run: --execution was auto (mode {choice.mode}) and is eager now; "
            "repeat its own options, or choose another --out"
        )
    return choice


def require_execution(prepared: Prepared, choice: ExecutionChoice, saved: dict[str, Any] | None) -> None:
    """Refuse a fallback where the run was begun in another mode, or was to be compiled.

    Parameters
    ----------
    prepared : Prepared
    choice : ExecutionChoice
    saved : dict or None
        The recipe of the run to resume, if any. Before modes were saved, ``input-grad`` meant wherever it
        gains.

    Raises
    ------
    InputError
    """
    if prepared.mode == choice.mode:
        return
    if saved and ("execution" in saved or choice.mode != "input-grad"):
        raise InputError(f"{prepared.reason}, but in this run it was")
    if choice.mode == "compiled" and choice.reason == "asked for":
        raise InputError(f"{prepared.reason}, leave out --compile yes")


def describe_execution(prepared: Prepared, choice: ExecutionChoice) -> dict[str, Any]:
    """Return what a recipe keeps of the execution; ``compiled`` and ``captured`` are for earlier versions."""
    return {
        "execution": {"mode": prepared.mode, "reason": prepared.reason or choice.reason},
        "compiled": prepared.mode == "compiled",
        "captured": prepared.mode in ("compiled", "cuda-graph"),
    }
