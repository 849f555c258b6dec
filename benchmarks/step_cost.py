"""What one SFM step costs, against the bare forward and backward-to-input of the same batch.

Both use the same backbone object and alternate in one process; what counts is the median of the ratios of
neighbours. The pyramid has all its levels, the dearest stage of a run. No store is opened: the cost does not
depend on the class means, so random ones do.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --classes 100 --image-size 224 --device cuda --json step_cost.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.distill.engine import Plan, advance, begin
from sfm.distill.flow import flow, sfm_loss
from sfm.distill.pyramid import resolutions


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, with the work it put on the device."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def bare_call(backbone: Backbone, images: int) -> Callable[[], object]:
    """Return the bare work: forward of a normalised batch, in the layout that suits, and backward to it."""
    size = backbone.card.preprocessing.input_size
    convolutional = sum(isinstance(module, torch.nn.Conv2d) for module in backbone.model.modules()) > 1
    layout = torch.channels_last if convolutional else torch.contiguous_format
    batch = torch.randn(images, 3, size, size, device=backbone.device).contiguous(memory_format=layout)
    batch.requires_grad_()
    weights = torch.randn(images, backbone.card.features, device=backbone.device)
    return lambda: torch.autograd.grad((backbone.model(batch) * weights).sum(), batch)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both, in alternation."""
    backbone = load_backbone(arguments.backbone, image_size=arguments.image_size, device=arguments.device)
    plan = Plan(
        classes=arguments.classes,
        ipc=arguments.ipc,
        views=arguments.views,
        image_size=backbone.card.preprocessing.input_size,
        learning_rate=1e-2,
        grow_every=1,
        seed=0,
        micro_batch=arguments.classes * arguments.ipc,
        gradient="exact",
    )
    means = torch.randn(plan.classes, backbone.card.features, device=backbone.device)
    own = means[:, None] + torch.randn(plan.classes, plan.ipc, backbone.card.features, device=means.device)
    objective = partial(sfm_loss, target=flow(own, means))
    state = begin(plan, backbone.device)
    whole = partial(advance, state, plan, backbone, objective)
    for _ in resolutions(plan.canvas):
        whole()
    bare = bare_call(backbone, plan.classes * plan.ipc * plan.views)
    rounds = []
    for index in range(-arguments.warm_up, arguments.rounds):
        calls = (bare, whole) if index % 2 else (whole, bare)
        times = {call: seconds(call, backbone.device) for call in calls}
        if index >= 0:
            rounds.append({"bare": times[bare], "step": times[whole]})
    ratios = [each["step"] / each["bare"] for each in rounds]
    quarter = statistics.quantiles(ratios, n=4)
    return {
        "benchmark": "step_cost",
        "backbone": arguments.backbone,
        "image_size": plan.image_size,
        "canvas": plan.canvas,
        "classes": plan.classes,
        "ipc": plan.ipc,
        "views": plan.views,
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "bare_seconds": statistics.median(each["bare"] for each in rounds),
        "step_seconds": statistics.median(each["step"] for each in rounds),
        "bare_seconds_fastest": min(each["bare"] for each in rounds),
        "step_seconds_fastest": min(each["step"] for each in rounds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quarter[0], quarter[2]],
        "bar": 1.25,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    images = result["classes"] * result["ipc"]
    low, high = result["ratio_quartiles"]
    lines = [
        f"{result['backbone']} at {result['image_size']} px, {images} images x {result['views']} views, "
        f"{result['threads']} threads, median of {result['rounds']} alternating rounds",
        "",
        f"{'':34}{'ms':>9}{'fastest':>9}{'ratio':>9}",
    ]
    for label, key, ratio in (
        ("bare forward + backward-to-input", "bare", 1.0),
        ("SFM step, all levels", "step", result["ratio"]),
    ):
        median, fastest = result[f"{key}_seconds"], result[f"{key}_seconds_fastest"]
        lines.append(f"{label:34}{1e3 * median:9.1f}{1e3 * fastest:9.1f}{ratio:9.3f}")
    return "\n".join([*lines, "", f"ratio: quartiles {low:.3f} to {high:.3f}, bar {result['bar']}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
