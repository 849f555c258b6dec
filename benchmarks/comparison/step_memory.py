"""Peak memory of training steps, each measured in a process of its own."""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from comparison.training_steps import (
    SFM_STEPS,
    StepCase,
    drop_duplicate_steps,
    find_oversized_steps,
    make_default_run_config,
    make_training_step,
)
from measurement import log_progress, read_process_bytes

from sfm.backbones.execution.preparation import optimize_backbone
from sfm.distill.activation_memory import measure_activation_bytes_per_view

STEPS = 2
"""Steps until memory is at its peak; the optimizer state exists before the first."""


def measure_own_peak(case: StepCase, name: str, device: str) -> dict[str, int]:
    """Run a few steps in this process, and return their peak memory above the idle process."""
    # If memory runs out, the kernel ends this process and not another.
    Path("/proc/self/oom_score_adj").write_text("1000")
    backbone = case.load(device)
    step, held_bytes = make_training_step(name, case, backbone)
    run_config = make_default_run_config(case, optimize_backbone(backbone, 1, "input-grad")[0])
    measure_activation_bytes_per_view(backbone)
    gc.collect()
    cuda = backbone.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
    else:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        idle = read_process_bytes("VmRSS")
    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated() if cuda else read_process_bytes("VmHWM")
    return {
        "peak_bytes": peak - idle + held_bytes,
        "idle_bytes": idle,
        "micro_batch": run_config.micro_batch,
        "graphs": run_config.graphs,
    }


def measure_in_subprocess(case: StepCase, name: str, device: str) -> dict[str, int] | None:
    """Return what :func:`measure_own_peak` returns in a new process; None if that runs out of memory."""
    request = json.dumps({"case": asdict(case), "name": name, "device": device})
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "comparison.step_memory", request],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    return None if done.returncode else json.loads(done.stdout)


def measure_peak_memory(
    case: StepCase, names: Sequence[str], device: str, repeats: int
) -> list[dict[str, Any]]:
    """Return a row per step with the median peak of several processes, or an estimate if it does not fit."""
    backbone = case.load(device)
    names = drop_duplicate_steps(
        names, make_default_run_config(case, optimize_backbone(backbone, 1, "input-grad")[0])
    )
    too_large = find_oversized_steps(names, case, backbone)
    del backbone
    gc.collect()
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, **case.labels()}
        if name in too_large:
            rows.append(row | {"estimated_bytes": too_large[name]})
            continue
        attempts = [measure_in_subprocess(case, name, device) for _ in range(repeats)]
        figures = sorted(filter(None, attempts), key=lambda each: each["peak_bytes"])
        peaks = [each["peak_bytes"] for each in figures]
        rows.append(row | (figures[len(figures) // 2] | {"peaks": peaks} if figures else {}))
        sizes = ", ".join(str(peak >> 20) for peak in peaks) or "too many"
        log_progress(f"memory of {name}, {case}: {sizes} MiB")
    return rows


def compute_class_growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratio of the default step's peaks at 1,000 and at 100 classes.

    Pyramids and optimizer state exist before the first step, so the peaks do not include them.
    """
    peaks = {
        (row["backbone"], row["image_size"], row["classes"]): row["peak_bytes"]
        for row in rows
        if row["name"] == SFM_STEPS[0] and "peak_bytes" in row
    }
    return [
        {"backbone": backbone, "image_size": size, "ratio": peak / peaks[backbone, size, 100]}
        for (backbone, size, classes), peak in peaks.items()
        if classes == 1000 and (backbone, size, 100) in peaks
    ]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure_own_peak(StepCase(**asked["case"]), asked["name"], asked["device"])))
