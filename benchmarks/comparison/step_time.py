"""Time per training step, in rounds that alternate between the steps."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from comparison.training_steps import (
    BARE,
    BARE_LGM,
    LGM,
    PUBLISHED,
    SFM_STEPS,
    StepCase,
    drop_duplicate_steps,
    estimate_graph_bytes,
    find_oversized_steps,
    make_default_run_config,
    make_training_step,
)
from torch.utils.flop_counter import FlopCounterMode

from sfm.backbones.build import Backbone
from sfm.backbones.execution.preparation import optimize_backbone
from sfm.distill.mixed_precision import Precision

MAX_CALLS_PER_ROUND = 3
"""Largest number of timed calls of a step in a round."""

COMPARED_STEPS = (
    (SFM_STEPS[0], LGM),
    (SFM_STEPS[0], PUBLISHED),
    (SFM_STEPS[0], BARE),
    (SFM_STEPS[1], BARE),
    (SFM_STEPS[2], BARE),
    (PUBLISHED, BARE),
    (LGM, BARE_LGM),
)


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, including its work on the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def empty_cuda_cache() -> None:
    """Release cached GPU memory, so that the next step does not find it fragmented by others."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm_up(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Run every call twice and return the seconds of the second; remove calls that run out of memory.

    The first call compiles and records CUDA graphs.
    """
    seconds = {}
    for _ in range(2):
        for name in list(calls):
            empty_cuda_cache()
            try:
                seconds[name] = time_call(calls[name], device)
            except torch.OutOfMemoryError:
                del calls[name]
    return {name: max(seconds[name], 1e-6) for name in calls}


def time_in_rounds(
    calls: dict[str, Callable[[], object]], budget: float, device: torch.device
) -> list[dict[str, float]]:
    """Time calls in rounds, each in a random order, for about `budget` seconds.

    Calls that run out of memory are removed. In a round, every call runs once untimed, because it finds
    memory and caches as another one left them. Then it runs as often as fits into the time of the slowest, at
    most `MAX_CALLS_PER_ROUND` times, and the median counts.
    """
    rng = np.random.default_rng(0)
    estimates = warm_up(calls, device)
    slowest = max(estimates.values())
    repeats = {name: min(MAX_CALLS_PER_ROUND, int(slowest / each)) for name, each in estimates.items()}

    def time_repeatedly(name: str) -> float:
        empty_cuda_cache()
        calls[name]()
        return statistics.median(time_call(calls[name], device) for _ in range(repeats[name]))

    round_seconds = sum((1 + repeats[name]) * seconds for name, seconds in estimates.items())
    rounds = []
    for _ in range(max(5, min(60, int(budget / round_seconds)))):
        order = rng.permutation(list(calls)).tolist()
        rounds.append({name: time_repeatedly(name) for name in order})
    return rounds


def compute_ratio(rounds: Sequence[dict[str, float]], name: str, other: str) -> dict[str, float] | None:
    """Return median and quartiles of the ratios of two steps over rounds; None if one did not run."""
    if name not in rounds[0] or other not in rounds[0]:
        return None
    low, median, high = statistics.quantiles([times[name] / times[other] for times in rounds], n=4)
    return {"median": median, "low": low, "high": high}


def measure_matmul_rate(device: torch.device, precision: Precision) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    times = [time_call(lambda: matrix @ matrix, device) for _ in range(6)]
    return 2 * side**3 / min(times)


def count_flops(backbone: Backbone) -> int:
    """Count the floating-point operations of forward and backward-to-input of one image."""
    size = backbone.card.preprocessing.input_size
    image = torch.randn(1, 3, size, size, device=backbone.device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        # The counter's hooks do not support torch.autograd.grad.
        backbone.model(image).sum().backward()
    return counter.get_total_flops()


def measure_step_times(case: StepCase, names: Sequence[str], device: str, budget: float) -> dict[str, Any]:
    """Return times and ratios of the steps that fit into memory, and estimates for those that do not."""
    backbone = case.load(device)
    run_config = make_default_run_config(case, optimize_backbone(backbone, 1, "input-grad")[0])
    names = drop_duplicate_steps(names, run_config)
    too_large = find_oversized_steps(names, case, backbone)
    calls = {name: make_training_step(name, case, backbone)[0] for name in names if name not in too_large}
    rounds = time_in_rounds(calls, budget, backbone.device)
    seconds = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    dropped = [name for name in names if name not in seconds and name not in too_large]
    too_large |= {name: estimate_graph_bytes(name, case, backbone) for name in dropped}
    ratios = {f"{name} / {other}": compute_ratio(rounds, name, other) for name, other in COMPARED_STEPS}
    flops, rate = case.classes * count_flops(backbone), measure_matmul_rate(backbone.device, case.precision)
    return {
        **case.labels(),
        "micro_batch": run_config.micro_batch,
        "graphs": run_config.graphs,
        "rounds": len(rounds),
        "seconds": seconds,
        "fastest": {name: min(times[name] for times in rounds) for name in seconds},
        "ratios": {pair: ratio for pair, ratio in ratios.items() if ratio},
        "share_of_matrix_rate": flops / seconds[SFM_STEPS[0]] / rate if SFM_STEPS[0] in seconds else None,
        "too_large": too_large,
    }
