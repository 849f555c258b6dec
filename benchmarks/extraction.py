"""Speed of extraction against its components and against a plain loop, and its memory.

    python benchmarks/extraction.py [--json FILE] [--quick] [--sizes 1000,6000,60000] [--device cuda]

1. *Against its components.* With d the rate of decode + resize and f that of the forward pass alone, each on
   all cores (the faster of one batch per core and all cores on one batch), the pass over the images should
   reach 1/(1/d + 1/f) on a CPU and min(d, f) on a GPU. Two backbones should cost one decoding and both
   forwards. Both figures are given for the forward pass of the model and for that of the backbone as
   extraction prepares it, which is faster on a CPU. Rounds alternate; medians count. With --processes 4,8
   the pass also runs in several processes, which share the device. For a GPU, d is measured in a process per
   core. The plain `model(batch)` on all cores is given for comparison.
2. *Against a plain loop* as in research code: load a class, forward it in batches, stack. Each figure comes
   from a process of its own: images/s from opening the source to the class means, and peak memory. Processes
   that decode for a GPU, some 110 MiB each, are not counted, but the memory they share is.
3. *Mixed precision*, on a GPU: the cosine between the flows of bf16 and of float32.

The images are Fashion-MNIST: as in the package, as PNG files of 28 px, and enlarged with a little noise to
JPEG files of 500 x 375 px and about 100 kB, as ImageNet's are. Files are repeated as hard links.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import log_progress, write_json
from rich.console import Console
from rich.table import Table
from throughput.component_rates import (
    measure_decode_rate,
    measure_forward_rates,
    measure_multiprocess_rate,
    measure_pass_rate,
    measure_process_decode_rate,
    run_extraction_pass,
)
from throughput.image_folders import N_CLASSES, make_image_source, take_subset
from throughput.plain_loop import measure_method

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.allocator import (
    LARGE_INPUT,
    SINGLE_HEAP_ENVIRONMENT,
    configure_malloc_to_keep_memory,
)
from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.runtime import (
    BATCH_IMAGES,
    ExtractionRuntime,
    count_cores,
    extraction_runtime,
    optimize_for_inference,
)
from sfm.pipeline.sources import Source, open_source

MAX_FLOW_IMAGES = 4000
INPUT_SIZES = {"embedded": 96, "tiny": 96, "jpeg": 224}
"""Input size of the backbones by kind of images, in pixels."""


def measure_round(
    source: Source,
    backbones: Sequence[Backbone],
    fast_backbones: Sequence[Backbone],
    runtime: ExtractionRuntime,
    images: int,
) -> dict[str, float]:
    """Return the rates of the pass and of its components, and their ratios, measured once.

    Parameters
    ----------
    source : Source
    backbones, fast_backbones : sequence of two Backbone
        As loaded; and as extraction prepares them.
    runtime : ExtractionRuntime
    images : int
        Number of images for the rates of the components.
    """
    first, second = backbones
    cuda = first.device.type == "cuda"
    # Threads of one process cannot decode for a GPU as fast as processes can.
    decode = (measure_process_decode_rate if cuda else measure_decode_rate)(source, first, images)
    plain_rates = measure_forward_rates(first, images)
    forward = max(plain_rates), max(measure_forward_rates(second, images))
    # On a GPU, extraction uses the model as it is.
    packed = forward if cuda else [max(measure_forward_rates(each, images)) for each in fast_backbones]
    one = measure_pass_rate(source, [first], runtime)
    two = measure_pass_rate(source, backbones, runtime)
    log_progress(
        f"decode {decode:.0f}, forward {forward[0]:.0f} and {forward[1]:.0f}, pass {one:.0f}, pass of two "
        f"backbones {two:.0f} images/s"
    )
    found = {"decode": decode, "pass": one, "two_backbones": two, "of_plain_loop": one / plain_rates[0]}
    for suffix, (f, g) in (("", forward), ("_packed", packed)):
        possible = min(decode, f) if cuda else 1 / (1 / decode + 1 / f)
        seconds = max(1 / decode, 1 / f + 1 / g) if cuda else 1 / decode + 1 / f + 1 / g
        found |= {
            f"forward{suffix}": f,
            f"of_possible{suffix}": one / possible,
            f"two_cost{suffix}": 1 / two / seconds,
        }
    return found


def compare_with_components(
    root: Path, kind: str, images: int, n_rounds: int, device: str, processes: Sequence[int]
) -> dict[str, Any]:
    """Compare the pass with its components, for one and for two backbones, and in several processes."""
    size = INPUT_SIZES[kind]
    backbones = [load_backbone(spec, image_size=size, device=device) for spec in ("lite0", "lite1")]
    device_type = backbones[0].device.type
    source = open_source(make_image_source(root, kind, images))
    with extraction_runtime(source, device_type, count_cores()) as runtime:
        # The first pass includes the start of processes and the planning of cuDNN.
        batch = BATCH_IMAGES[device_type]
        subset = take_subset(source, 16 * batch + len(source.train.labels) % batch)
        start = time.perf_counter()
        measure_pass_rate(subset, backbones, runtime)
        log_progress(f"{kind}: a first, short pass by two backbones took {time.perf_counter() - start:.1f} s")
        fast = optimize_for_inference(backbones, "float32")
        rounds = [measure_round(source, backbones, fast, runtime, images) for _ in range(n_rounds)]
    medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    return {
        "kind": kind,
        "images": images,
        "image_size": size,
        **medians,
        "processes": {n: measure_multiprocess_rate(source.spec, size, device, n) for n in processes},
        "rounds": rounds,
    }


def run_in_subprocess(size: int, *arguments: str) -> Any:
    """Run this file in a new process, with the allocator settings of the command line for an image size."""
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | (SINGLE_HEAP_ENVIRONMENT if size > LARGE_INPUT else {})
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    # A process that ran out of memory has no result.
    return json.loads(done.stdout) if done.returncode == 0 else None


def compare_with_plain_loop(root: Path, kind: str, sizes: Sequence[int], device: str) -> list[dict[str, Any]]:
    """Measure extraction and the plain loop for each number of images, in a process each."""
    rows = []
    size = INPUT_SIZES[kind]
    for images in sizes:
        spec = make_image_source(root, kind, images)
        row: dict[str, Any] = {"kind": kind, "images": images}
        for method in ("plain", "sfm"):
            request = ["--measure-method", method, spec, str(size), "--device", device]
            row[method] = run_in_subprocess(size, *request)
            log_progress(f"{kind}, {images} images, {method}: {row[method]}")
        rows.append(row)
    return rows


def compare_bf16_flows(root: Path, images: int, device: str) -> float:
    """Return the cosine between the flows of class means of bf16 and of float32."""
    backbone = load_backbone("lite0", image_size=224, device=device)
    source = open_source(make_image_source(root, "jpeg", images))
    flows = []
    for precision in ("float32", "bf16"):
        with (
            tempfile.TemporaryDirectory() as folder,
            extraction_runtime(source, backbone.device.type, count_cores()) as runtime,
        ):
            _, gathered, staging = run_extraction_pass(source, [backbone], Path(folder), runtime, precision)
            train = [p for p in gathered.partitions if p.split == "train"]
            rows = staging.open_features(backbone.card.hash, train)
            mean = accumulate_moments(rows, N_CLASSES, backbone.card.features).mean
            flows.append((mean.sum(axis=0) - mean) / (N_CLASSES - 1) - mean)
    a, b = (flow.ravel() for flow in flows)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def print_component_rates(console: Console, result: dict[str, Any]) -> None:
    """Print the rates of the pass and of its components, and their ratios."""
    title = f"The pass against its components, {result['device']}, {result['cores']} cores, images/s"
    table = Table(title=title)
    for column in ("images", "px", "decode", "pass", "of model(batch) (bar 0.85)", "two backbones",
                   "forward of", "forward", "of possible (bar 0.90)", "cost of two (bar 1.05)"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in result["parts"]:
        first_cells = [
            row["kind"],
            str(row["image_size"]),
            f"{row['decode']:.0f}",
            f"{row['pass']:.0f}",
            f"{row['of_plain_loop']:.2f}",
            f"{row['two_backbones']:.0f}",
        ]
        for suffix, label in (("", "the model"), ("_packed", "extraction")):
            table.add_row(
                *([""] * len(first_cells) if suffix else first_cells),
                label,
                f"{row['forward' + suffix]:.0f}",
                f"{row['of_possible' + suffix]:.2f}",
                f"{row['two_cost' + suffix]:.2f}",
            )
    console.print(table)
    for row in result["parts"]:
        for count, rate in row["processes"].items():
            console.print(f"  {row['kind']}, the pass in {count} processes: {rate:.0f} images/s")


def print_plain_loop(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print images/s and peak memory of the plain loop and of extraction."""
    table = Table(title="Against the plain loop: images/s, and peak memory in MiB")
    for column in ("images", "number", "plain loop", "sfm", "plain loop MiB", "sfm MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["plain"], row["sfm"]]
        rates = ["out of memory" if cell is None else f"{cell['rate']:.0f}" for cell in cells]
        peaks = ["–" if cell is None else f"{cell['peak_bytes'] / 2**20:.0f}" for cell in cells]
        table.add_row(row["kind"], f"{row['images']:,}", *rates, *peaks)
    console.print(table)


def parse_extraction_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few images, one round, as a smoke test")
    parser.add_argument(
        "--sizes", default="1000,6000,60000", help="numbers of images for the plain loop; '' for none"
    )
    parser.add_argument("--kinds", default="embedded,tiny,jpeg", help="kinds of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1200, help="images per round, against the components")
    parser.add_argument(
        "--processes", default="", help="numbers of processes for the pass besides one, e.g. 4,8"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--measure-method", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--compare-components", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the figures; in a subprocess, print one measurement as JSON."""
    configure_malloc_to_keep_memory()
    arguments = parse_extraction_arguments()
    device = arguments.device
    processes = [int(number) for number in arguments.processes.split(",") if number]
    if arguments.compare_components:
        folder, kind, images, rounds = arguments.compare_components
        row = compare_with_components(Path(folder), kind, int(images), int(rounds), device, processes)
        print(json.dumps(row))
    elif arguments.measure_method:
        method, spec, size = arguments.measure_method
        print(json.dumps(measure_method(method, spec, int(size), device)))
    else:
        run_benchmark(arguments)


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Run all measurements, each in a process of its own, and print and write the figures."""
    device, kinds = arguments.device, arguments.kinds.split(",")
    sizes = [64, 128] if arguments.quick else [int(size) for size in arguments.sizes.split(",") if size]
    images, rounds = (96, 1) if arguments.quick else (arguments.images, arguments.rounds)
    cuda = torch.cuda.is_available() and device != "cpu"
    result: dict[str, Any] = {
        "benchmark": "extraction",
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cores": count_cores(),
        "torch": torch.__version__,
        "parts": [],
        "plain_loop": [],
        "flow_cosine_bf16": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            request = ["--compare-components", folder, kind, str(images), str(rounds), "--device", device]
            row = run_in_subprocess(INPUT_SIZES[kind], *request, "--processes", arguments.processes)
            result["parts"].append(row)
            write_json(result, arguments.json)
        for kind in kinds:
            if kind != "embedded":
                result["plain_loop"] += compare_with_plain_loop(Path(folder), kind, sizes, device)
                write_json(result, arguments.json)
        if cuda:
            count = min(10 * images, MAX_FLOW_IMAGES)
            result["flow_cosine_bf16"] = compare_bf16_flows(Path(folder), count, device)
    console = Console(width=130, highlight=False)
    print_component_rates(console, result)
    print_plain_loop(console, result["plain_loop"])
    if result["flow_cosine_bf16"] is not None:
        console.print(f"cosine of flows, bf16 against float32: {result['flow_cosine_bf16']:.6f} (bar 0.9999)")
    write_json(result, arguments.json)


if __name__ == "__main__":
    main()
