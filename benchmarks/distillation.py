r"""What a step of `sfm distill` costs and how far it comes, against LGM, the published SFM, and bare work.

    python benchmarks/distillation.py [--quick] [--json FILE] [--only time memory accuracy agreement]
    python benchmarks/distillation.py --only accuracy --source idx:FOLDER --work runs --rates 0.005 0.01 0.02
    python benchmarks/distillation.py --backbone random/vit_base_patch14_dinov2 --image-size 224 \
        --classes 100 1000 --only time memory

time
    All contenders in one process, in rounds, each in a random order: once untimed, then timed as often as the
    slowest takes time for, three times at most; medians over rounds of the ratios within a round. *Bare* is
    forward and backward-to-input, by autograd, of the backbone as `load_backbone` gives it, on normalised
    noise: of as many images as a step of ours looks at; and, for LGM, forward of a real batch and forward and
    backward of the views. Pyramids have all their levels, the dearest stage of a run. The share of the matrix
    rate counts the bare work of a step against the rate of one large matrix product.
memory
    Every contender in a process of its own, three times, of which the median counts (heaps differ by a fifth
    from run to run): the peak while it does a few steps, above what is there before the first, once all is
    loaded, one view has been through the backbone and freed memory is given back. Resident memory on a CPU;
    on a GPU, allocated memory and what recorded kernels hold. What would not fit is not run. On a CPU all of
    them keep freed memory as the command line does; with the C library's own thresholds peaks were within a
    tenth.
agreement
    Cosines of gradients of ten images, views without noise, in twenty draws: of micro-batches that go forward
    twice with the whole batch, in the same precision; and, where there is a GPU, of ours there with the one
    that autograd has on the CPU in float32, once.
accuracy
    LGM, with the learning rate that is best on the tuning split (never on held-out data), until its last
    step; ours as it comes. Both leave their images at some marks; these are scored afterwards, by `sfm
    evaluate`, on held-out features. Time is that of the steps alone. With --work an interrupted section goes
    on from the last mark.

Opponents are in peers/. Time and memory do not depend on what class means are, so they are random there; nor
on labels, so that images of ten classes stand for any number. `random/MODEL` is an architecture of timm's
with random weights.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peers import lgm, published
from peers.race import LGM_VIEWS, Race, run_race, tell
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sfm.api import DistillConfig
from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.allocator import keep_freed_memory
from sfm.backbones.execution.determinism import deterministic_algorithms, tf32_disabled
from sfm.backbones.execution.preparation import count_graph_bytes, optimize_backbone
from sfm.backbones.execution.process_settings import set_cublas_workspace
from sfm.distill import engine
from sfm.distill.activation_memory import count_activation_bytes, read_free_bytes
from sfm.distill.adam import no_moments
from sfm.distill.augment import draw_views
from sfm.distill.engine import Plan, State, grown
from sfm.distill.execution_choice import MIN_VIEWS_TO_COMPILE, choose_execution
from sfm.distill.flow import flow, sfm_loss
from sfm.distill.gradient import Batch, Cut, pull
from sfm.distill.group import ALONE
from sfm.distill.mixed_precision import AutocastModel, Precision, convert_precision
from sfm.distill.pyramid import resolutions
from sfm.distill.run import plan_of
from sfm.pipeline.sources import open_source

BUILTIN = "builtin:fashion-mnist-6k"
VIT = "random/vit_base_patch14_dinov2"
OURS = ("ours, default", "ours, whole batch", "ours, exact, forward twice")
PUBLISHED, LGM, BARE, BARE_LGM = "published SFM", f"LGM, {LGM_VIEWS} views", "bare, ours", "bare, LGM's"
CONTENDERS = (BARE, *OURS, PUBLISHED, LGM, BARE_LGM)
MOST_OF_FREE = 0.8
"""Share of the free memory up to which something is run: a machine that swaps measures nothing."""
MOST_CALLS = 3
"""Times that a contender is timed in a round, at most: some of the noise of a machine is short."""
DRAWS = 20
"""Of pyramids and views, whose gradients are compared."""
STEPS = 2
"""Until memory is at its peak; everybody has the optimizer's moments before the first."""


@dataclass(frozen=True)
class Case:
    """What a step is measured on.

    Attributes
    ----------
    backbone : str
        As asked for; may be ``random/MODEL``.
    spec : str
        What :func:`load_backbone` takes for it.
    image_size : int
        In pixels.
    classes : int
    precision : {"float32", "bf16"}
        Of everybody's forward passes.
    """

    backbone: str
    spec: str
    image_size: int
    classes: int
    precision: Precision = "float32"

    def __str__(self) -> str:
        """Name it for a person."""
        mixed = "" if self.precision == "float32" else f" in {self.precision}"
        return f"{self.backbone}{mixed}, {self.image_size} px, {self.classes:,} classes"

    def row(self) -> dict[str, Any]:
        """Return what figures are labelled with."""
        return {
            "backbone": self.backbone,
            "precision": self.precision,
            "image_size": self.image_size,
            "classes": self.classes,
        }

    def load(self, device: str) -> Backbone:
        """Load the backbone, in its precision."""
        backbone = load_backbone(self.spec, image_size=self.image_size, device=device)
        return convert_precision(backbone, self.precision)


# What takes part


def default_plan(case: Case, backbone: Backbone) -> Plan:
    """Return the plan that `sfm distill` would make, but with a level per step."""
    config = DistillConfig(store="none", backbone=case.spec, dataset="none", out=Path("none"), grow_every=1)
    return plan_of(config, case.classes, backbone, {}, ALONE)


def whole_pyramid(plan: Plan, device: torch.device) -> State:
    """Return the state at which the pyramid has all its levels."""
    levels: list[Tensor] = []
    for _ in resolutions(plan.canvas):
        levels = grown(levels, plan, device)
    return State(len(levels), levels, no_moments(levels))


def bare(backbone: Backbone, images: int, real: int = 0) -> Callable[[], object]:
    """Return the bare work of a step: forward of normalised images, in the layout that suits, and backward.

    Parameters
    ----------
    backbone : Backbone
    images : int
        That go forward and backward.
    real : int
        That go forward only.
    """
    size, device = backbone.card.preprocessing.input_size, backbone.device

    def noise(count: int) -> Tensor:
        return torch.randn(count, 3, size, size, device=device).contiguous(memory_format=backbone.memory_format)

    batch, other = noise(images).requires_grad_(), noise(real)
    weights = torch.randn(images, backbone.card.features, device=device)

    def work() -> None:
        if real:
            with torch.no_grad():
                backbone.model(other)
        torch.autograd.grad((backbone.model(batch) * weights).sum(), batch)

    return work


def cut_of(name: str, plan: Plan) -> Plan:
    """Return the plan of one of ours: the default; all in one graph; or one graph kept, of half at most."""
    if name == OURS[1]:
        return replace(plan, micro_batch=plan.images, graphs=plan.images)
    if name == OURS[2]:
        return replace(plan, micro_batch=min(plan.micro_batch, max(1, plan.images // 2)), graphs=0)
    return plan


def different(names: Sequence[str], plan: Plan) -> list[str]:
    """Leave out those of ours that come to what another does anyhow."""
    plans = {name: cut_of(name, plan) for name in OURS}
    first = {name: next(other for other in OURS if plans[other] == plans[name]) for name in OURS}
    return [name for name in names if first.get(name, name) == name]


def contender(name: str, case: Case, backbone: Backbone) -> tuple[Callable[[], object], int]:
    """Return a step of a contender, and the bytes that it holds on to; every call does the next step."""
    if name in OURS:
        return step_of_ours(name, case, backbone)
    theirs = step_of_others(name, case, backbone)

    def step() -> object:
        with tf32_disabled():
            return theirs()

    return step, 0


def input_grad(backbone: Backbone) -> Backbone:
    """Return a backbone in the execution mode of a CPU."""
    return optimize_backbone(backbone, 1, "input-grad")[0]


def step_of_ours(name: str, case: Case, backbone: Backbone) -> tuple[Callable[[], object], int]:
    """Return a step as `sfm distill` does it, and what its recorded kernels hold."""
    device = backbone.device
    plan = cut_of(name, default_plan(case, input_grad(backbone)))
    with tf32_disabled(), deterministic_algorithms(device):
        mode = choose_execution(plan, "auto", "auto", device).mode
        quick, _ = optimize_backbone(backbone, plan.micro_batch * plan.views, mode)
    state, means = whole_pyramid(plan, device), random_means(case, backbone)
    objective = partial(sfm_loss, target=flow(means, means))

    def step() -> object:
        with tf32_disabled(), deterministic_algorithms(device):
            return engine.advance(state, plan, quick, objective)

    return step, count_graph_bytes(quick)


def random_means(case: Case, backbone: Backbone) -> Tensor:
    """Draw class means, shape (C, D)."""
    drawn = torch.randn(case.classes, backbone.card.features, generator=torch.Generator().manual_seed(0))
    return drawn.to(backbone.device)


def step_of_others(name: str, case: Case, backbone: Backbone) -> Callable[[], object]:
    """Return a step of an opponent, or bare work."""
    device = backbone.device
    plan = default_plan(case, input_grad(backbone))
    if name == BARE:
        return bare(backbone, plan.images)
    if name == BARE_LGM:
        return bare(backbone, LGM_VIEWS * plan.images, LGM_VIEWS * plan.images)
    if name == LGM:
        plan = replace(plan, views=LGM_VIEWS)
        real = some_real_images(backbone, plan)
        return partial(lgm.advance, whole_pyramid(plan, device), plan, backbone, real)
    theirs = published_in_precision(case, backbone)
    whole = whole_pyramid(plan, device)
    state = published.State(whole.step, whole.levels, published.adam(whole.levels, plan))
    # torch makes the moments in the first step, which moves nothing here; ours are there from the start.
    for level in state.levels:
        level.grad = torch.zeros_like(level)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return partial(published.advance, state, plan, theirs, random_means(case, backbone))


def published_in_precision(case: Case, backbone: Backbone) -> Backbone:
    """Return the backbone as the published code has it; for bf16, under autocast."""
    theirs = published.published_backbone(case.spec, backbone)
    return theirs if case.precision == "float32" else replace(theirs, model=AutocastModel(theirs.model))


def some_real_images(backbone: Backbone, plan: Plan) -> lgm.RealImages:
    """Return real images for three batches of LGM, of as many classes as there are to be."""
    source = open_source(BUILTIN)
    count = 3 * plan.images * plan.views
    rows = np.arange(min(count, 600))
    images = lgm.decoded(source, rows, backbone, plan.canvas).pixels
    real = lgm.RealImages(images[np.arange(count) % len(rows)], np.arange(count) % plan.classes)
    real.batch(np.zeros(0, dtype=np.int64), backbone.device)
    return real


def graph_bytes(name: str, case: Case, backbone: Backbone) -> int:
    """Estimate what a contender's graph holds, from that of one view."""
    plan = default_plan(case, ours := input_grad(backbone))
    if name in OURS:
        cut = cut_of(name, plan)
        return max(cut.micro_batch, cut.graphs) * count_activation_bytes(ours)
    if name == PUBLISHED:
        return plan.images * count_activation_bytes(published_in_precision(case, backbone))
    return (1 if name == BARE else LGM_VIEWS) * plan.images * count_activation_bytes(backbone)


def too_large_for(names: Sequence[str], case: Case, backbone: Backbone) -> dict[str, int]:
    """Return the estimates of the contenders that are too large for the free memory.

    On a GPU ours holds its graph between two steps, so that others have to fit beside it.
    """
    free = MOST_OF_FREE * read_free_bytes(backbone.device)
    held = 2 if backbone.device.type == "cuda" else 1
    needs = {name: graph_bytes(name, case, backbone) for name in names}
    return {name: need for name, need in needs.items() if need * (held if name in OURS else 1) > free}


# Time


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, with the work it put on the device."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def released() -> None:
    """Give freed memory of a GPU back, so that the next contender does not find it cut up by others."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warmed(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Make every call twice, drop those that lack memory beside the others; return what the rest take.

    What is compiled and recorded is made in the first, and stays.
    """
    seconds = {}
    for _ in range(2):
        for name in list(calls):
            released()
            try:
                seconds[name] = seconds_of(calls[name], device)
            except torch.OutOfMemoryError:
                del calls[name]
    return {name: max(seconds[name], 1e-6) for name in calls}


def in_turn(
    calls: dict[str, Callable[[], object]], budget: float, device: torch.device
) -> list[dict[str, float]]:
    """Time calls in rounds, each in a random order, for about `budget` seconds.

    Those that do not fit in memory are dropped from the calls. In a round every call is made once untimed,
    since it finds memory and caches as another contender has left them; then as often as the slowest takes
    time for, `MOST_CALLS` times at most, of which the median counts.
    """
    rng = np.random.default_rng(0)
    first = warmed(calls, device)
    times = {name: min(MOST_CALLS, int(max(first.values()) / seconds)) for name, seconds in first.items()}

    def median(name: str) -> float:
        released()
        calls[name]()
        return statistics.median(seconds_of(calls[name], device) for _ in range(times[name]))

    once = sum((1 + times[name]) * seconds for name, seconds in first.items())
    rounds = []
    for _ in range(max(5, min(60, int(budget / once)))):
        order = rng.permutation(list(calls)).tolist()
        rounds.append({name: median(name) for name in order})
    return rounds


def ratio(rounds: Sequence[dict[str, float]], one: str, other: str) -> dict[str, float] | None:
    """Return median and quartiles of the ratios of two contenders; None if one was not run."""
    if one not in rounds[0] or other not in rounds[0]:
        return None
    each = [times[one] / times[other] for times in rounds]
    low, middle, high = statistics.quantiles(each, n=4)
    return {"median": middle, "low": low, "high": high}


RATIOS = (
    (OURS[0], LGM),
    (OURS[0], PUBLISHED),
    (OURS[0], BARE),
    (OURS[1], BARE),
    (OURS[2], BARE),
    (PUBLISHED, BARE),
    (LGM, BARE_LGM),
)


def matrix_rate(device: torch.device, precision: Precision) -> float:
    """Return the floating-point operations per second of a large product of matrices."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    times = [seconds_of(lambda: matrix @ matrix, device) for _ in range(6)]
    return 2 * side**3 / min(times)


def operations(backbone: Backbone) -> int:
    """Count the floating-point operations of forward and backward-to-input of one image."""
    size = backbone.card.preprocessing.input_size
    image = torch.randn(1, 3, size, size, device=backbone.device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        # The counter's hooks do not stand torch.autograd.grad.
        backbone.model(image).sum().backward()
    return counter.get_total_flops()


def measure_time(case: Case, names: Sequence[str], device: str, budget: float) -> dict[str, Any]:
    """Time the contenders that fit, in turn."""
    backbone = case.load(device)
    names = different(names, default_plan(case, input_grad(backbone)))
    too_large = too_large_for(names, case, backbone)
    calls = {name: contender(name, case, backbone)[0] for name in names if name not in too_large}
    rounds = in_turn(calls, budget, backbone.device)
    found = {f"{one} / {other}": ratio(rounds, one, other) for one, other in RATIOS}
    seconds = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    dropped = [name for name in names if name not in seconds and name not in too_large]
    too_large |= {name: graph_bytes(name, case, backbone) for name in dropped}
    work, plan = case.classes * operations(backbone), default_plan(case, input_grad(backbone))
    rate = matrix_rate(backbone.device, case.precision)
    share = work / seconds[OURS[0]] / rate if OURS[0] in seconds else None
    return {
        **case.row(),
        "micro_batch": plan.micro_batch,
        "graphs": plan.graphs,
        "rounds": len(rounds),
        "seconds": seconds,
        "fastest": {name: min(times[name] for times in rounds) for name in seconds},
        "ratios": {name: value for name, value in found.items() if value},
        "share_of_matrix_rate": share,
        "too_large": too_large,
    }


# Agreement


def gradient_with(plan: Plan, case: Case, backbone: Backbone, quick: Backbone) -> Tensor:
    """Return the gradient with respect to untrained pyramids, flat, float64, on the CPU.

    Views are without noise, which a GPU draws otherwise.
    """
    place = backbone.device
    views = draw_views(plan.seed, 0, plan.images, plan.canvas)
    quiet = replace(views, noisy=np.zeros_like(views.noisy))
    levels = whole_pyramid(plan, place).levels
    batch = Batch(levels, plan.canvas, plan.image_size, quiet, (plan.classes, 1, 1))
    means = random_means(case, backbone)
    objective = partial(sfm_loss, target=flow(means, means))
    found: dict[int, list[Tensor]] = {}
    with tf32_disabled(), deterministic_algorithms(place):
        cut = Cut(plan.micro_batch, "exact", plan.graphs)
        pull(batch, quick, objective, cut, None, lambda part, each: found.update({part.start: each}))
    parts = [found[start] for start in sorted(found)]
    whole = [torch.cat([part[level] for part in parts]) for level in range(len(levels))]
    return torch.cat([level.flatten() for level in whole]).double().cpu()


def gradient_on(case: Case, device: str) -> Tensor:
    """Return the gradient of a few images, flat.

    On a GPU as `sfm distill` has it, images going forward twice in two micro-batches; on the CPU, in float32
    and of all images at once.
    """
    if device == "cpu":
        case = replace(case, precision="float32")
    backbone = case.load(device)
    place = backbone.device
    plan = replace(default_plan(case, input_grad(backbone)), micro_batch=case.classes, graphs=0)
    if device != "cpu":
        plan = replace(plan, micro_batch=math.ceil(case.classes / 2))
    with tf32_disabled(), deterministic_algorithms(place):
        many = replace(plan, steps=MIN_VIEWS_TO_COMPILE)
        mode = choose_execution(many, "auto", "auto", place).mode
        quick, _ = optimize_backbone(backbone, plan.micro_batch * plan.views, mode)
    return gradient_with(plan, case, backbone, quick)


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of two vectors."""
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def measure_agreement(case: Case, device: str) -> list[dict[str, Any]]:
    """Compare gradients of ten images: of micro-batches with that of the whole batch, over several draws.

    And, where there is a GPU, that of ours there with that of autograd on the CPU in float32.
    """
    case = replace(case, classes=min(case.classes, 10))
    rows = []
    if torch.cuda.is_available() and device != "cpu":
        found = [cosine(gradient_on(case, "cuda"), gradient_on(case, "cpu"))]
        rows.append({**case.row(), "what": "GPU and CPU", "cosines": found})
    backbone = case.load(device)
    quick = input_grad(backbone)
    plan = replace(default_plan(case, quick), micro_batch=case.classes, graphs=case.classes)
    draws = [replace(plan, seed=seed) for seed in range(DRAWS)]
    whole = [gradient_with(draw, case, backbone, quick) for draw in draws]
    for size in (1, 3, 5):
        cut = [replace(draw, micro_batch=size, graphs=0) for draw in draws]
        found = [
            cosine(gradient_with(each, case, backbone, quick), exact)
            for each, exact in zip(cut, whole, strict=True)
        ]
        rows.append({**case.row(), "what": f"{size} at a time and whole batch", "cosines": found})
    return rows


# Memory


def status(field: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def child(text: str) -> None:
    """Do a few steps of one contender in this process, and print the peak of its memory above the idle."""
    asked = json.loads(text)
    # Should memory run out after all, the kernel ends this process and not a neighbour.
    Path("/proc/self/oom_score_adj").write_text("1000")
    case = Case(**asked["case"])
    backbone = case.load(asked["device"])
    step, held = contender(asked["name"], case, backbone)
    plan = default_plan(case, input_grad(backbone))
    count_activation_bytes(backbone)
    gc.collect()
    cuda = backbone.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    found = {"peak_bytes": peak - before + held, "idle_bytes": before}
    print(json.dumps(found | {"micro_batch": plan.micro_batch, "graphs": plan.graphs}))


def measure_memory(case: Case, names: Sequence[str], device: str, repeats: int) -> list[dict[str, Any]]:
    """Measure contenders, each in processes of its own: the peak is the median of so many."""
    backbone = case.load(device)
    names = different(names, default_plan(case, input_grad(backbone)))
    too_large = too_large_for(names, case, backbone)
    del backbone
    gc.collect()
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, **case.row()}
        if name in too_large:
            rows.append(row | {"estimated_bytes": too_large[name]})
            continue
        asked = {"case": asdict(case), "name": name, "device": device}
        command = [sys.executable, __file__, "--child", json.dumps(asked)]
        tries = []
        for _ in range(repeats):
            out = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            # A process that ran out of memory prints nothing, which says enough.
            if out.returncode == 0:
                tries.append(json.loads(out.stdout))
        tries.sort(key=lambda found: found["peak_bytes"])
        peaks = [found["peak_bytes"] for found in tries]
        middle = tries[len(tries) // 2] | {"peaks": peaks} if tries else {}
        rows.append(row | middle)
        shown = ", ".join(str(peak >> 20) for peak in peaks) or "too many"
        tell(f"memory of {name}, {case}: {shown} MiB")
    return rows


# Bars


def bars(result: dict[str, Any]) -> Iterator[tuple[str, float | None, float, str]]:
    """Yield what is asked for: what, the figure (None: not to be had), the bar, and at most or at least."""
    for row in result.get("time", []):
        where = f"{row['backbone']}, {row['image_size']} px, {row['classes']} classes"
        for one, other, bar in (
            (OURS[0], LGM, 1 / 8),
            (OURS[0], PUBLISHED, 0.65),
            (OURS[1], BARE, 1.1),
            (OURS[0], BARE, 1.1 if row["micro_batch"] >= row["classes"] else 1.6),
            (OURS[2], BARE, 1.6),
            (LGM, BARE_LGM, 1.15),
        ):
            found = row["ratios"].get(f"{one} / {other}")
            if found:
                yield f"time, {one} / {other}; {where}", found["median"], bar, "<="
    peaks = {
        (row["backbone"], row["image_size"], row["classes"], row["name"]): row.get("peak_bytes")
        for row in result.get("memory", [])
    }
    for (backbone, size, classes, name), ours in peaks.items():
        if name != OURS[0] or ours is None:
            continue
        where = f"{backbone}, {size} px, {classes} classes"
        for other, bar in ((LGM, 1 / 15), (PUBLISHED, 1 / 5)):
            theirs = peaks.get((backbone, size, classes, other))
            if theirs and (other == LGM or classes >= 100):
                yield f"memory, {name} / {other}; {where}", ours / theirs, bar, "<="
    for row in result.get("agreement", []):
        where = f"{row['backbone']} in {row['precision']}, {row['image_size']} px"
        between = row["what"].startswith("GPU")
        if not between and row["precision"] != "float32":
            continue
        bar = 0.999 if between else 0.9999
        yield f"gradient, least cosine of {row['what']}; {where}", min(row["cosines"]), bar, ">="
    for row in result.get("growth", []):
        where = f"{row['backbone']}, {row['image_size']} px"
        yield f"memory, 1,000 / 100 classes, {OURS[0]}; {where}", row["ratio"], 1.1, "<="
    if "accuracy" in result:
        found = result["accuracy"]
        ours, theirs = (found["seconds_to_target"][way] for way in ("ours", "lgm"))
        yield "time to LGM's final accuracy, ours / LGM", None if ours is None else ours / theirs, 1 / 5, "<="
        (our_top1, _), (their_top1, _) = (found["top1"][way] for way in ("ours", "lgm"))
        yield "final top-1, ours - LGM, points", 100 * (our_top1 - their_top1), 0, ">="


def growth_with_classes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the peaks of ours at 1,000 and at 100 classes.

    Pyramids and the optimizer's moments are there before the first step, so the peaks are without them.
    """
    ours = {
        (row["backbone"], row["image_size"], row["classes"]): row["peak_bytes"]
        for row in rows
        if row["name"] == OURS[0] and "peak_bytes" in row
    }
    return [
        {"backbone": backbone, "image_size": size, "ratio": large / ours[backbone, size, 100]}
        for (backbone, size, classes), large in ours.items()
        if classes == 1000 and (backbone, size, 100) in ours
    ]


# Tables


def at_a_time(row: dict[str, Any]) -> str:
    """Say how the default goes through its images."""
    return f"{row['micro_batch']} at a time, {min(row['graphs'], row['classes'])} once"


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=130)
    if result["quick"]:
        console.print("--quick: too few rounds and steps for figures that count")
    for row in result.get("time", []):
        title = f"Time per step: {row['backbone']}, {row['image_size']} px, {row['classes']} classes, "
        table = Table(title=f"{title}{result['threads']} threads, {row['rounds']} rounds")
        for column in ("contender", "median ms", "fastest ms"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for name, middle in row["seconds"].items():
            shown = f"{name} ({at_a_time(row)})" if name == OURS[0] else name
            table.add_row(shown, f"{1e3 * middle:.1f}", f"{1e3 * row['fastest'][name]:.1f}")
        for name, need in row["too_large"].items():
            table.add_row(name, f"needs about {need / 2**30:.0f} GiB", "")
        console.print(table)
        for name, found in row["ratios"].items():
            line = f"  {name}: {found['median']:.3f} (quartiles {found['low']:.3f} to {found['high']:.3f})"
            console.print(line, highlight=False)
        if row["share_of_matrix_rate"] is not None:
            share = 100 * row["share_of_matrix_rate"]
            console.print(
                f"  {OURS[0]}: {share:.0f} % of the rate of a large matrix product", highlight=False
            )
    if "memory" in result:
        table = Table(title="Peak memory above the idle process")
        for column in ("contender", "backbone", "px", "classes", "ours", "MiB", "idle MiB"):
            table.add_column(column, justify="left" if column in ("contender", "backbone") else "right")
        for row in result["memory"]:
            peak, need = row.get("peak_bytes"), row.get("estimated_bytes")
            shown = f"{peak / 2**20:.0f}" if peak is not None else "out of memory"
            table.add_row(
                row["name"],
                row["backbone"],
                str(row["image_size"]),
                f"{row['classes']:,}",
                at_a_time(row) if row["name"] == OURS[0] and peak is not None else "",
                f"not run: about {need / 2**20:.0f}" if need else shown,
                f"{row['idle_bytes'] / 2**20:.0f}" if peak is not None else "",
            )
        console.print(table)
        for row in result["growth"]:
            console.print(
                f"  1,000 / 100 classes, {row['image_size']} px: {row['ratio']:.2f}",
                highlight=False,
            )
    for row in result.get("agreement", []):
        low, middle = min(row["cosines"]), statistics.median(row["cosines"])
        console.print(
            f"  gradient, {row['what']}, {row['backbone']} in {row['precision']}, {row['image_size']} px: "
            f"cosine {middle:.7f} (median of {len(row['cosines'])}, least {low:.7f})",
            highlight=False,
        )
    if "accuracy" in result:
        show_accuracy(console, result["accuracy"])
    table = Table(title="Bars")
    for column in ("what", "figure", "bar", ""):
        table.add_column(column, justify="right" if column in ("figure", "bar") else "left")
    for bar in result["bars"]:
        digits = 6 if 0.99 < bar["bar"] < 1 else 3
        figure = "not reached" if bar["figure"] is None else f"{bar['figure']:.{digits}f}"
        met = "met" if bar["met"] else "NOT MET"
        table.add_row(bar["what"], figure, f"{bar['sense']} {bar['bar']:.{digits}f}", met)
    console.print(table)


def show_accuracy(console: Console, found: dict[str, Any]) -> None:
    """Print how far both came, and when."""
    title = f"{found['source']}, {found['real_images']:,} real images, {found['backbone']}, "
    table = Table(title=f"{title}{found['image_size']} px, 1 image per class, {found['seeds']} seeds")
    for column in ("", "top-1 % at the end", "seconds in all", "seconds to LGM's final top-1"):
        table.add_column(column, justify="right" if column else "left")
    for way, name in (("lgm", f"{LGM}, learning rate {found['rate']:g}"), ("ours", OURS[0])):
        mean, deviation = found["top1"][way]
        to_target = found["seconds_to_target"][way]
        table.add_row(
            name,
            f"{100 * mean:.1f} ± {100 * deviation:.1f}",
            f"{found['seconds_in_all'][way]:.0f}",
            "not reached" if to_target is None else f"{to_target:.0f}",
        )
    console.print(table)
    rates = ", ".join(f"{each['rate']:g}: {100 * each['top1']:.1f}" for each in found["tuning"])
    console.print(f"  LGM on the tuning split, top-1 % by learning rate: {rates}", highlight=False)
    for way, points in found["mean_curve"].items():
        line = ", ".join(f"{point['seconds']:.0f} s {100 * point['top1']:.1f}" for point in points)
        console.print(f"  {way}, top-1 % on the way: {line}", highlight=False)


# The command


def with_weights(spec: str, folder: Path) -> str:
    """Return a spec as it is, or, for ``random/MODEL``, one of a file of random weights."""
    kind, _, model = spec.partition("/")
    if kind != "random":
        return spec
    torch.manual_seed(0)
    path = folder / f"{model}.safetensors"
    if not path.exists():
        tensors = timm.create_model(model).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return f"timm/{model}@{path}"


def cases_of(given: argparse.Namespace, folder: Path) -> list[Case]:
    """Return what to measure: all classes at the first size, the first number of classes at all sizes."""
    cases = [
        Case(spec, with_weights(spec, folder), size, classes, given.precision)
        for spec in given.backbone
        for size in given.image_size
        for classes in given.classes
        if size == given.image_size[0] or classes == given.classes[0]
    ]
    if given.with_vit:
        spec = with_weights(VIT, folder)
        cases += [Case(VIT, spec, 224, classes, "bf16") for classes in (100, 1000)]
    return cases


def taking_part(case: Case, given: argparse.Namespace) -> list[str]:
    """Return the contenders of a case: if it is to be quick, LGM has the smallest only."""
    left_out = (LGM, BARE_LGM) if given.quick and case.classes > min(given.classes) else ()
    return [name for name in CONTENDERS if name not in left_out]


def memory_rows(cases: Sequence[Case], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all contenders in all cases, and ours at 1,000 classes where it is measured at 100."""
    rows = []
    for case in cases:
        names = [name for name in taking_part(case, given) if name not in (BARE, BARE_LGM)]
        rows += measure_memory(case, names, given.device, given.repeats)
        if case.classes == 100 and replace(case, classes=1000) not in cases:
            rows += measure_memory(replace(case, classes=1000), OURS[:1], given.device, given.repeats)
    return rows


def main() -> None:
    """Measure, print, and write the figures."""
    keep_freed_memory()
    set_cublas_workspace()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", nargs="+", help="default: lite0; on a GPU also a random ViT-B/14")
    parser.add_argument("--image-size", nargs="+", type=int, help="default: 96 224")
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--only", nargs="+", choices=["time", "memory", "accuracy", "agreement"])
    parser.add_argument("--quick", action="store_true", help="little of everything: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--seconds", type=float, default=90, help="of timing, per case")
    accuracy = parser.add_argument_group("accuracy")
    accuracy.add_argument("--source", default=BUILTIN, help="dataset, e.g. idx:FOLDER")
    accuracy.add_argument("--store", help="store of its statistics, or where to make it")
    accuracy.add_argument("--work", type=Path, help="folder for runs; what it holds is not done again")
    accuracy.add_argument("--seeds", type=int, default=3)
    accuracy.add_argument("--steps-lgm", type=int, default=3000)
    accuracy.add_argument("--steps-tune", type=int, default=1000, help="of LGM's runs for its learning rate")
    accuracy.add_argument(
        "--grow-lgm", type=int, help="LGM's pyramid grows as in so many steps; default: --steps-tune"
    )
    accuracy.add_argument(
        "--rates", nargs="+", type=float, default=[0.002, 0.005, 0.01, 0.02], help="for LGM to choose from"
    )
    accuracy.add_argument("--steps", type=int, help="of ours; default: as sfm distill")
    accuracy.add_argument("--every", type=int, default=100, help="steps after which ours is scored")
    accuracy.add_argument("--every-lgm", type=int, default=200)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    cuda = torch.cuda.is_available() and given.device != "cpu"
    given.with_vit = cuda and given.backbone is None and not given.quick
    given.backbone = given.backbone or ["lite0"]
    given.repeats = 1 if given.quick or cuda else 3
    given.image_size = given.image_size or ([96] if given.quick else [96, 224])
    if given.quick:
        given.seconds, given.seeds, given.steps, given.steps_lgm, given.steps_tune = 15.0, 1, 60, 20, 20
        given.rates, given.every, given.every_lgm = given.rates[-1:], 15, 10
    only = given.only or ["time", "memory", "accuracy", "agreement"]

    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {
            "benchmark": "distillation",
            "quick": given.quick,
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
        }
        cases = cases_of(given, Path(scratch))
        if "memory" in only:
            result["memory"] = memory_rows(cases, given)
            result["growth"] = growth_with_classes(result["memory"])
            write(result, given.json)
        if "time" in only:
            result["time"] = []
            for case in cases:
                tell(f"time, {case}")
                result["time"].append(
                    measure_time(case, taking_part(case, given), given.device, given.seconds)
                )
                write(result, given.json)
                gc.collect()
        if "agreement" in only:
            each = {(case.spec, case.image_size): case for case in cases}
            result["agreement"] = [
                row for case in each.values() for row in measure_agreement(case, given.device)
            ]
        if "accuracy" in only:
            result["accuracy"] = run_race(
                Race(
                    spec=cases[0].spec,
                    image_size=given.image_size[0],
                    device=given.device,
                    source=given.source,
                    store=given.store,
                    work=given.work or Path(scratch),
                    seeds=given.seeds,
                    rates=given.rates,
                    steps_lgm=given.steps_lgm,
                    steps_tune=given.steps_tune,
                    grow_lgm=given.grow_lgm or given.steps_tune,
                    steps=given.steps,
                    every=given.every,
                    every_lgm=given.every_lgm,
                    quick=given.quick,
                )
            )
        result["bars"] = [
            {"what": what, "figure": figure, "bar": bar, "sense": sense, "met": is_met(figure, bar, sense)}
            for what, figure, bar, sense in bars(result)
        ]
    show(result)
    write(result, given.json)


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write what is known so far, if it is asked for."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def is_met(figure: float | None, bar: float, sense: str) -> bool:
    """Say whether a figure is as asked for; one that could not be had is not."""
    if figure is None or math.isnan(figure):
        return False
    return figure <= bar if sense == "<=" else figure >= bar


if __name__ == "__main__":
    main()
