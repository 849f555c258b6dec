"""Choose the execution mode of a run: from its options, its size, the device and the processes."""

from typing import Literal

import torch

from sfm.backbones.execution.compilation import can_compile_for
from sfm.backbones.execution.modes import ExecutionOption
from sfm.backbones.execution.preparation import PreparedModel
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.resolved_config import UNKNOWN_EXECUTION_REASON, ExecutionChoice, ResolvedDistillConfig
from sfm.errors import InputError

CompileOption = Literal["auto", "yes", "no"]

MIN_VIEWS_TO_COMPILE = 100_000
"""Total number of views from which on compiling pays off on a GPU."""


def should_compile(
    compile_option: CompileOption,
    total_view_count: int,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> bool:
    """Return whether to compile; compiled models are also recorded, which takes a GPU and one process.

    Parameters
    ----------
    compile_option : {"auto", "yes", "no"}
    total_view_count : int
        Over all steps.
    device : torch.device
    group : ProcessGroup

    Raises
    ------
    InputError
        If it is requested and not possible.
    """
    if compile_option == "yes" and (device.type != "cuda" or group.size > 1):
        raise InputError("--compile yes is for a run in one process on a GPU: leave it out")
    if compile_option == "yes" and not can_compile_for(device):
        raise InputError(
            "--compile yes needs Triton for this GPU, and a C compiler: install them, or leave it out"
        )
    can = group.size == 1 and can_compile_for(device)
    return can and (
        compile_option == "yes" or (compile_option == "auto" and total_view_count >= MIN_VIEWS_TO_COMPILE)
    )


def choose_execution(
    config: ResolvedDistillConfig,
    execution_option: ExecutionOption,
    compile_option: CompileOption,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ExecutionChoice:
    """Choose the execution mode of a new run.

    Process groups do not use CUDA graphs: their communication cannot be recorded. Nor is a run
    that keeps several autograd graphs: a recording has one.

    Raises
    ------
    InputError
        If the options contradict each other, or the run is to be compiled and cannot be.
    """
    if execution_option == "eager":
        if compile_option == "yes":
            raise InputError("--execution eager compiles nothing: leave out --compile yes")
        return ExecutionChoice(mode="eager", reason="asked for")
    one_graph = config.graphs <= config.micro_batch
    worth = should_compile(compile_option, config.steps * config.image_count * config.views, device, group)
    if compile_option == "yes" and not one_graph:
        raise InputError("--compile yes keeps the graph of one micro-batch: lower --graphs, or leave it out")
    if device.type != "cuda":
        return ExecutionChoice(mode="input-grad", reason="on a CPU")
    if group.size > 1:
        return ExecutionChoice(mode="input-grad", reason="several processes")
    if not one_graph:
        return ExecutionChoice(mode="input-grad", reason="several graphs are kept")
    if worth:
        return ExecutionChoice(
            mode="compiled", reason="asked for" if compile_option == "yes" else "a long run on a GPU"
        )
    return ExecutionChoice(mode="cuda-graph", reason="on a GPU")


def require_resumable_execution_option(
    saved_config: ResolvedDistillConfig, execution_option: ExecutionOption
) -> None:
    """Refuse an option that contradicts the execution mode of a saved run, which a resumed one keeps.

    Raises
    ------
    InputError
        If the option is "eager" and the saved run was not.
    """
    if execution_option == "eager" and saved_config.execution.mode != "eager":
        raise InputError(
            f"cannot resume the run: --execution was auto (mode {saved_config.execution.mode}) and is eager "
            "now; repeat its own options, or choose another --out"
        )


def require_no_unwanted_fallback(
    prepared: PreparedModel, choice: ExecutionChoice, *, is_resumed: bool
) -> None:
    """Refuse a fallback where the run was begun in another mode, or was to be compiled.

    Raises
    ------
    InputError
        With the reason of the fallback.
    """
    if prepared.mode == choice.mode:
        return
    # Before modes were saved, input-grad meant wherever it gains.
    is_known = choice.reason != UNKNOWN_EXECUTION_REASON or choice.mode != "input-grad"
    if is_resumed and is_known:
        raise InputError(f"{prepared.reason}, but in this run it was")
    if choice.mode == "compiled" and choice.reason == "asked for":
        raise InputError(f"{prepared.reason}, leave out --compile yes")
