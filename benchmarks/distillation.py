r"""Time, memory and accuracy of `sfm distill` against LGM, published SFM and the backbone alone.

    python benchmarks/distillation.py [--quick] [--json FILE] [--only time memory accuracy agreement]
    python benchmarks/distillation.py --only accuracy --source idx:FOLDER --work runs --rates 0.005 0.01 0.02
    python benchmarks/distillation.py --backbone random/vit_base_patch14_dinov2 --image-size 224 \
        --classes 100 1000 --only time memory

time
    Steps run in one process, in rounds of random order. In each round a step runs once untimed, then up to
    three times. The ratios are medians over rounds. "Bare" is forward and backward-to-input, by autograd, of
    the backbone from `load_backbone` on normalised noise: with as many images as a step of ours has views,
    and, for LGM, with its real batch (forward only) and its views. Pyramids have all their levels, which is
    the most expensive stage of a run. The share of the matrix rate divides the operations of a bare step by
    the rate of one large matrix product.
memory
    Each step runs in a process of its own, three times; the median counts (heaps differ by a fifth between
    runs). The figure is the peak during a few steps above the memory before the first one, after loading, one
    view's forward pass and giving freed memory back. It is resident memory on a CPU, and allocated memory
    plus CUDA graphs on a GPU. Steps that would not fit are not run. On a CPU all steps use the allocator
    settings of `load_backbone`; with those of the C library the peaks were within a tenth.
agreement
    Cosines between gradients of ten images, views without noise, over twenty draws: micro-batches that go
    forward twice against the whole batch in the same precision; and, on a GPU, one draw against autograd on
    the CPU in float32.
accuracy
    LGM runs with the learning rate that is best on the tuning split (never on held-out data), SFM with its
    defaults. Both write snapshots of their images, which `sfm evaluate` scores afterwards on held-out
    features. Only the time of steps counts. With --work an interrupted run resumes.

The other methods are in peers/. Time and memory do not depend on class means or labels, so means are random
and images of ten classes stand for any number. `random/MODEL` is a timm architecture with random weights.
"""

import argparse
import gc
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from comparison.accuracy_curves import compare_accuracy
from comparison.bars import evaluate_bars
from comparison.gradient_agreement import measure_gradient_agreement
from comparison.result_tables import print_result_tables
from comparison.snapshots import AccuracyConfig
from comparison.step_memory import compute_class_growth, measure_peak_memory
from comparison.step_time import measure_step_times
from comparison.training_steps import BARE, BARE_LGM, BUILTIN, LGM, SFM_STEPS, STEP_NAMES, StepCase
from measurement import log_progress, write_json
from safetensors.torch import save_file

from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.backbones.execution.process_settings import set_default_cublas_workspace

VIT = "random/vit_base_patch14_dinov2"
SECTIONS = ["time", "memory", "accuracy", "agreement"]


def write_random_weights(spec: str, folder: Path) -> str:
    """Return a spec; for ``random/MODEL``, write random weights first and return theirs."""
    kind, _, model = spec.partition("/")
    if kind != "random":
        return spec
    torch.manual_seed(0)
    path = folder / f"{model}.safetensors"
    if not path.exists():
        tensors = timm.create_model(model).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return f"timm/{model}@{path}"


def make_cases(options: argparse.Namespace, folder: Path) -> list[StepCase]:
    """Return the cases: every class count at the first size, and every size with the first class count."""
    cases = [
        StepCase(spec, write_random_weights(spec, folder), size, classes, options.precision)
        for spec in options.backbone
        for size in options.image_size
        for classes in options.classes
        if size == options.image_size[0] or classes == options.classes[0]
    ]
    if options.with_vit:
        spec = write_random_weights(VIT, folder)
        cases += [StepCase(VIT, spec, 224, classes, "bf16") for classes in (100, 1000)]
    return cases


def select_steps(case: StepCase, options: argparse.Namespace) -> list[str]:
    """Return the names of the steps to run; with --quick, LGM runs in the smallest case only."""
    skipped = (LGM, BARE_LGM) if options.quick and case.classes > min(options.classes) else ()
    return [name for name in STEP_NAMES if name not in skipped]


def measure_memory_of_cases(cases: Sequence[StepCase], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every step in every case, and ours with 1,000 classes too where 100 classes are measured."""
    rows = []
    for case in cases:
        names = [name for name in select_steps(case, options) if name not in (BARE, BARE_LGM)]
        rows += measure_peak_memory(case, names, options.device, options.repeats)
        larger = replace(case, classes=1000)
        if case.classes == 100 and larger not in cases:
            rows += measure_peak_memory(larger, SFM_STEPS[:1], options.device, options.repeats)
    return rows


def parse_benchmark_options() -> argparse.Namespace:
    """Parse the command line and fill in the defaults that depend on other options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", nargs="+", help="default: lite0; on a GPU also a random ViT-B/14")
    parser.add_argument("--image-size", nargs="+", type=int, help="default: 96 224")
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="run little of everything, as a smoke test")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--seconds", type=float, default=90, help="of timing, per case")
    accuracy = parser.add_argument_group("accuracy")
    accuracy.add_argument("--source", default=BUILTIN, help="dataset, e.g. idx:FOLDER")
    accuracy.add_argument("--store", help="store of its statistics; extracted there if missing")
    accuracy.add_argument("--work", type=Path, help="folder for runs; finished ones are not repeated")
    accuracy.add_argument("--seeds", type=int, default=3)
    accuracy.add_argument("--steps-lgm", type=int, default=3000)
    accuracy.add_argument("--steps-tune", type=int, default=1000, help="of LGM's runs for its learning rate")
    accuracy.add_argument(
        "--grow-lgm", type=int, help="steps of the run whose growth schedule LGM uses; default: --steps-tune"
    )
    accuracy.add_argument(
        "--rates", nargs="+", type=float, default=[0.002, 0.005, 0.01, 0.02], help="for LGM to choose from"
    )
    accuracy.add_argument("--steps", type=int, help="of ours; default: as sfm distill")
    accuracy.add_argument("--every", type=int, default=100, help="steps between snapshots of ours")
    accuracy.add_argument("--every-lgm", type=int, default=200)
    options = parser.parse_args()
    options.cuda = torch.cuda.is_available() and options.device != "cpu"
    options.with_vit = options.cuda and options.backbone is None and not options.quick
    options.backbone = options.backbone or ["lite0"]
    options.repeats = 1 if options.quick or options.cuda else 3
    options.image_size = options.image_size or ([96] if options.quick else [96, 224])
    if options.quick:
        options.seconds, options.seeds, options.rates = 15.0, 1, options.rates[-1:]
        options.steps, options.steps_lgm, options.steps_tune = 60, 20, 20
        options.every, options.every_lgm = 15, 10
    return options


def make_accuracy_config(case: StepCase, options: argparse.Namespace, scratch: Path) -> AccuracyConfig:
    """Return the settings of the accuracy section."""
    return AccuracyConfig(
        spec=case.spec,
        image_size=options.image_size[0],
        device=options.device,
        source=options.source,
        store=options.store,
        work=options.work or scratch,
        seeds=options.seeds,
        rates=options.rates,
        steps_lgm=options.steps_lgm,
        steps_tune=options.steps_tune,
        grow_lgm=options.grow_lgm or options.steps_tune,
        steps=options.steps,
        every=options.every,
        every_lgm=options.every_lgm,
        quick=options.quick,
    )


def main() -> None:
    """Measure, print, and write the figures."""
    configure_malloc_to_keep_memory()
    set_default_cublas_workspace()
    options = parse_benchmark_options()
    result: dict[str, Any] = {
        "benchmark": "distillation",
        "quick": options.quick,
        "device": torch.cuda.get_device_name() if options.cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as scratch:
        cases = make_cases(options, Path(scratch))
        if "memory" in options.only:
            result["memory"] = measure_memory_of_cases(cases, options)
            result["growth"] = compute_class_growth(result["memory"])
            write_json(result, options.json)
        if "time" in options.only:
            result["time"] = []
            for case in cases:
                log_progress(f"time, {case}")
                names = select_steps(case, options)
                result["time"].append(measure_step_times(case, names, options.device, options.seconds))
                write_json(result, options.json)
                gc.collect()
        if "agreement" in options.only:
            distinct = {(case.spec, case.image_size): case for case in cases}
            result["agreement"] = [
                row for case in distinct.values() for row in measure_gradient_agreement(case, options.device)
            ]
        if "accuracy" in options.only:
            result["accuracy"] = compare_accuracy(make_accuracy_config(cases[0], options, Path(scratch)))
    result["bars"] = evaluate_bars(result)
    print_result_tables(result)
    write_json(result, options.json)


if __name__ == "__main__":
    main()
