"""Measure what each optimisation of the execution layer gains alone, in `sfm distill` and `sfm extract`.

    python benchmarks/execution.py --out execution.json

Every variant leaves out one optimisation and keeps all others; the last one is `--execution eager`. The
variants of a case run in one process, in interleaved rounds. A figure is the median over the rounds of the
ratio to the variant that has everything, so that the load of the machine cancels out. Times are CPU seconds
of the process (`--wall`: wall time). A gain is the share of the time without the optimisation that the
optimisation saves. Memory that a process keeps stays kept; that variant runs in processes of its own, and
its times are minima.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from comparison.training_steps import StepCase, draw_class_means, init_full_pyramid, make_default_run_config
from measurement import log_progress, write_json
from torch import Tensor, nn

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.crops import Crops
from sfm.backbones.execution import conv_kernels, input_grad_layers, input_gradient, optimize_backbone
from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.backbones.views import apply_crops, make_interpolation_matrices
from sfm.distill import augment, train_step
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.pyramid import make_decorrelated_to_rgb_matrix
from sfm.pipeline.runtime import BATCH_IMAGES

ALL, EAGER, FOLDING, ALLOCATOR = "everything", "eager", "folded batch norms", "kept freed memory"


@dataclass(frozen=True)
class Case:
    """A command, the input size in pixels and, for distillation, the number of classes."""

    command: str
    image_size: int
    classes: int = 10

    def __str__(self) -> str:
        """Return the heading of the case."""
        classes = f", {self.classes} classes" if self.command == "distill" else ""
        return f"sfm {self.command}, {self.image_size} px{classes}"


MEASURED_CASES = (
    Case("distill", 96),
    Case("distill", 96, 100),
    Case("distill", 224),
    Case("extract", 96),
    Case("extract", 224),
)


def make_unpacked_conv(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    clip: Any,
) -> Callable[[Tensor], Tensor]:
    """Return a function that convolves and clips with PyTorch's public operations."""

    def convolve(images: Tensor) -> Tensor:
        output = nn.functional.conv2d(images, weight, bias, stride, padding, dilation, groups)
        return output if clip is None else output.clamp_(*clip)

    return convolve


@cache
def get_upsampling(sides: tuple[int, ...], canvas: int) -> Tensor:
    """Return the matrix that upsamples the rows of levels and adds them up, shape (canvas, sum of sides)."""
    whole = [
        make_interpolation_matrices(np.zeros(1), np.full(1, float(side)), side, canvas) for side in sides
    ]
    return torch.cat(whole, dim=2)[0]


def decode_plainly(levels: Sequence[Tensor], canvas: int, color_decorrelation: bool = True) -> Tensor:
    """Decode pyramids of decorrelated colours with matrix products and autograd."""
    assert color_decorrelation
    coarse = [level for level in levels if level.shape[-1] < canvas]
    sides = tuple(level.shape[-1] for level in coarse)
    wide = [level @ get_upsampling((side,), canvas).T for level, side in zip(coarse, sides, strict=True)]
    total = get_upsampling(sides, canvas) @ torch.cat(wide, dim=2)
    total = total + levels[-1] if len(coarse) < len(levels) else total
    return torch.matmul(2 * make_decorrelated_to_rgb_matrix(), total.flatten(2)).view(total.shape).sigmoid()


def crop_plainly(images: Tensor, crops: Crops, out: int) -> Tensor:
    """Cut and resize crops with matrix products and autograd."""
    views = len(crops.top) // len(images)
    return apply_crops(images if views == 1 else images.repeat_interleave(views, 0), crops, out)


OPTIMISATIONS: dict[str, list[tuple[Any, str, Any]]] = {
    ALL: [],
    "packed convolution weights": [(conv_kernels, "_make_conv_and_clip", make_unpacked_conv)],
    "transposed kernels backward": [(conv_kernels, "_suits_onednn", lambda _: False)],
    "fused chains, chunked": [(input_gradient, "fuse_conv_chains_in_place", lambda model, _: model)],
    "  chunks alone": [(input_grad_layers, "BACKWARD_BYTES", 2**60)],
    FOLDING: [],
    "hand-written pyramid and crops": [
        (train_step, "decode_pyramid", decode_plainly),
        (augment, "apply_several_crops_per_image", crop_plainly),
    ],
    "  pyramid alone": [(train_step, "decode_pyramid", decode_plainly)],
    "  crops alone": [(augment, "apply_several_crops_per_image", crop_plainly)],
    EAGER: [],
}
"""What to replace to leave out an optimisation."""

OF_STEPS = ("transposed", "fused", "chunks", "hand-written", "pyramid", "crops")
"""Words of the optimisations that a forward pass has no part in."""


@contextmanager
def without(name: str) -> Iterator[None]:
    """Leave out an optimisation within a context."""
    with ExitStack() as stack:
        for target, attribute, value in OPTIMISATIONS[name]:
            stack.enter_context(patch.object(target, attribute, value))
        yield


def make_variants(spec: str, case: Case) -> dict[str, Callable[[], object]]:
    """Return functions that run a step, or the forward pass of a batch, each without one optimisation."""
    load = partial(load_backbone, spec, image_size=case.image_size, device="cpu")
    folded, plain = load(), load(fold_norms=False)
    variants = {}
    for name in OPTIMISATIONS:
        if case.command == "extract" and any(word in name for word in OF_STEPS):
            continue
        backbone = plain if name in (FOLDING, EAGER) else folded
        make = make_extract_forward if case.command == "extract" else partial(make_distill_step, spec, case)
        with without(name):
            variants[name] = make(backbone, name == EAGER)
            variants[name]()
    return variants


def make_extract_forward(backbone: Backbone, eager: bool) -> Callable[[], object]:
    """Return a function that extracts the features of a batch."""
    optimized = optimize_for_cpu_inference(backbone, "eager" if eager else "auto")
    side = backbone.card.preprocessing.input_size
    images = torch.rand(BATCH_IMAGES["cpu"] // (2 if side > 128 else 1), 3, side, side)
    return torch.inference_mode()(partial(optimized.features, images))


def make_distill_step(spec: str, case: Case, backbone: Backbone, eager: bool) -> Callable[[], object]:
    """Return a function that runs the next step of a distillation with full pyramids."""
    step_case = StepCase(spec, spec, case.image_size, case.classes)
    run_config = make_default_run_config(step_case, optimize_backbone(backbone, 1, "input-grad")[0])
    optimized, _ = optimize_backbone(backbone, 1, "eager" if eager else "input-grad")
    means = draw_class_means(step_case, backbone)
    state = init_full_pyramid(run_config, backbone.device)
    objective = partial(sfm_loss, target_flow=compute_flow(means, means))
    terms = [train_step.LossTerm(optimized, objective)]
    return partial(train_step.train_step, state, run_config, terms)


def measure_rounds(
    variants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of every variant in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            with without(name):
                began = clock()
                run()
                seconds[name].append(clock() - began)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row per variant: its shortest time, its ratio to everything, and the gain."""
    rows = []
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds[ALL], strict=True))
        rows.append({"without": name, "ms": 1000 * min(each), "ratio": ratio, "gain": 1 - 1 / ratio})
    return rows


def measure_allocator(arguments: list[str], rounds: int) -> dict[str, Any]:
    """Return the row of :func:`configure_malloc_to_keep_memory`: shortest times with and without it."""
    command = [sys.executable, __file__, *arguments, "--alone"]
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(max(2, rounds // 4)):
        for keep in times:
            done = subprocess.run(
                [*command, *([] if keep else ["--release"])], check=True, stdout=subprocess.PIPE, text=True
            )
            times[keep].append(json.loads(done.stdout))
    ratio = min(times[False]) / min(times[True])
    return {"without": ALLOCATOR, "ms": min(times[False]), "ratio": ratio, "gain": 1 - 1 / ratio}


def print_gains(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    print(f"\n| {case}: without | ms | ratio | gain |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['without']} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['gain']:.0%} |")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="lite0", help="spec of the backbone")
    parser.add_argument(
        "--case", type=int, nargs="*", default=range(len(MEASURED_CASES)), help="numbers of cases"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall time instead of CPU time")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--release", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print tables, and write the figures."""
    arguments = parse_arguments()
    if not arguments.release:
        configure_malloc_to_keep_memory()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.wall else time.process_time
    if arguments.alone:
        with patch.dict(OPTIMISATIONS, {ALL: []}, clear=True):
            variants = make_variants(arguments.backbone, MEASURED_CASES[arguments.case[0]])
            print(1000 * min(measure_rounds(variants, arguments.rounds, clock)[ALL]))
        return
    result: dict[str, Any] = {"backbone": arguments.backbone, "threads": arguments.threads, "cases": {}}
    for number in arguments.case:
        log_progress(str(MEASURED_CASES[number]))
        rows = summarize(
            measure_rounds(make_variants(arguments.backbone, MEASURED_CASES[number]), arguments.rounds, clock)
        )
        options = ["--backbone", arguments.backbone, "--rounds", str(arguments.rounds)]
        options += ["--threads", str(arguments.threads), *(["--wall"] if arguments.wall else [])]
        rows.append(measure_allocator([*options, "--case", str(number)], arguments.rounds))
        print_gains(MEASURED_CASES[number], rows)
        result["cases"][str(MEASURED_CASES[number])] = rows
    write_json(result, arguments.out)


if __name__ == "__main__":
    main()
