"""How fast extraction is, against what it is made of and against the plain loop; and its memory.

    python benchmarks/extraction.py [--json FILE] [--quick] [--sizes 1000,6000,60000] [--device cuda]

1. *Against its parts.* With d the rate of decode + resize and f that of the bare forward pass, each on all
   cores (the faster of: one batch per core, and all cores on one batch), the pass over the images should
   reach 1/(1/d + 1/f) on a CPU and min(d, f) on a GPU. Two backbones should cost one decoding and both
   forwards. Both are said for the forward pass of the model, and for that of the backbone as extraction has
   it, which is quicker on a CPU. Rounds alternate; medians count. With --processes 4,8 also the pass in so
   many processes, which share the device. For a GPU, d is measured in a process per core.
   Beside it stands what the plain `model(batch)` does on all cores.
2. *Against the plain loop* that research code has: load a whole class, forward in chunks, stack. Each number
   is that of a process of its own: images/s from opening the source to the class means, and the peak of its
   memory; those that decode for a GPU, some 110 MiB each, are not counted, but what they share is.
3. *Mixed precision*, on a GPU: the cosine between the flows of bf16 and of float32.

The images are Fashion-MNIST, real ones: as they come with the package, as PNG files of 28 px, and enlarged
with a little noise to JPEG files of 500 x 375 px and about 100 kB, as ImageNet's are; files are repeated, as
hard links, to make up the numbers.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.card import Preprocessing
from sfm.backbones.input import to_tensor
from sfm.backbones.memory import LARGE_INPUT, ONE_HEAP
from sfm.backbones.preprocess import crop
from sfm.events import no_progress
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.runtime import BATCH_IMAGES, ExtractionRuntime, choose_batch_size, count_cores, extraction_runtime, optimize_for_inference
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.feature_pass import stage_tasks, track_pass
from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.pass_result import collect_pass_result
from sfm.pipeline.selection import select_by_listed_labels
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.sources.source import recut
from sfm.pipeline.partition_tasks import PartitionTask, make_tasks
from sfm.pipeline.staging import Staging

CLASSES = 10
UNIQUE = 400
CHUNK = 64
FLOW_IMAGES = 4000
KINDS = {"embedded": 96, "tiny": 96, "jpeg": 224}
"""Per kind of image, the input size of the backbones, in pixels."""


def tell(line: str) -> None:
    """Say what is known so far; the tables come at the end."""
    print(f"[{time.strftime('%X')}] {line}", file=sys.stderr, flush=True)


def make_images(root: Path, kind: str, count: int) -> str:
    """Write `count` training images and a few held-out ones, and return the spec of the source.

    Those that are embedded are there already, 5,000 and 1,000.
    """
    if kind == "embedded":
        return "builtin:fashion-mnist-6k"
    source = open_source("builtin:fashion-mnist-6k")
    rng = np.random.default_rng(0)
    folder = root / f"{kind}-{count}"
    for split, images in (("train", count), ("test", 2 * CLASSES)):
        unique = min(images, UNIQUE)
        for i, sample in enumerate(source.splits[split].read(np.arange(unique))):
            file = folder / split / f"class-{i % CLASSES}" / f"{i:06d}.{'png' if kind == 'tiny' else 'jpg'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(source.decode(sample.data), kind, rng))
            for j in range(i + unique, images, unique):
                os.link(file, file.with_name(f"{j:06d}{file.suffix}"))
    return f"folder:{folder}"


def encoded(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """Return a file of the kind."""
    out = io.BytesIO()
    if kind == "tiny":
        image.save(out, "PNG")
    else:
        large = np.asarray(image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC))
        noisy = large + 12 * rng.standard_normal(large.shape, dtype=np.float32)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def run_pass(
    source: Source,
    backbones: Sequence[Backbone],
    folder: Path,
    equipment: ExtractionRuntime,
    precision: str = "float32",
) -> Any:
    """Do the pass over the images, and return what it cost and what is staged."""
    config = ExtractConfig(source=source.spec, store="none", backbone=["lite0"])
    tasks, staging = make_tasks(source, select_by_listed_labels(config, source)), Staging(folder)
    rules = PassOptions(precision="bf16" if precision == "bf16" else "float32")
    steps = stage_tasks(source, tasks, optimize_for_inference(backbones, precision), staging, rules, equipment)
    cost = track_pass(steps, tasks, tasks, staging, no_progress)
    return cost, collect_pass_result(config, source, tasks, staging), staging


def pass_rate(source: Source, backbones: Sequence[Backbone], equipment: ExtractionRuntime) -> float:
    """Return images/s of the pass."""
    with tempfile.TemporaryDirectory() as folder:
        return float(run_pass(source, backbones, Path(folder), equipment)[0].images_per_second)


def some_of(source: Source, count: int) -> Source:
    """Return a source of some of the training images, of all classes."""
    labels = source.train.labels
    rows = np.unique(np.linspace(0, len(labels) - 1, count).astype(np.int64))
    return replace(source, train=recut(source.train, rows, labels[rows], f"{count} of {source.spec}"))


def timed(call: Callable[[int], object], times: int, threads: int) -> float:
    """Return seconds of so many calls on so many threads; one is the main thread, which has the best heap."""
    if threads == 1:
        began = time.perf_counter()
        for i in range(times):
            call(i)
        return time.perf_counter() - began
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(call, range(times)))
        return time.perf_counter() - began


def decode_rate(source: Source, backbone: Backbone, images: int) -> float:
    """Return images/s of decode + resize from memory, on all cores, a batch at a time on each."""
    data = [sample.data for sample in source.train.read(np.arange(min(images, UNIQUE)))]
    size = BATCH_IMAGES["cpu"]

    def one(batch: int) -> None:
        for i in range(size * batch, size * batch + size):
            crop(source.decode(data[i % len(data)]), backbone.card.preprocessing)

    batches = max(count_cores(), images // size)
    return batches * size / timed(one, batches, count_cores())


def decode_some(spec: str, preprocessing: Preprocessing, times: int, wait: int) -> None:
    """Decode and resize a batch so many times, in a process that keeps the encoded images."""
    source, data = opened(spec)
    _together[0].wait(wait)
    for i in range(BATCH_IMAGES["cpu"] * times):
        crop(source.decode(data[i % len(data)]), preprocessing)


_together: list[Barrier] = []
"""In a process that decodes: where they wait for each other."""


def meet_at(barrier: Barrier) -> None:
    """Tell this process where to wait for the others."""
    _together.append(barrier)


@lru_cache(maxsize=1)
def opened(spec: str) -> tuple[Source, list[bytes]]:
    """Open a source and read some encoded images of it, once in a process."""
    source = open_source(spec)
    return source, [sample.data for sample in source.train.read(np.arange(UNIQUE))]


def decode_rate_of_processes(source: Source, backbone: Backbone, images: int) -> float:
    """Return images/s of decode + resize from memory in a process per core: no lock is shared."""
    count, context = count_cores(), get_context("fork")
    given = source.spec, backbone.card.preprocessing
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, meet_at, (barrier,)) as pool:
        # In the first round processes start and open the source; they wait for each other, so that each takes
        # one task.
        for times, seconds in ((1, 600), (max(1, images // (BATCH_IMAGES["cpu"] * count)), 60)):
            began = time.perf_counter()
            tasks = [pool.submit(decode_some, *given, times, seconds) for _ in range(count)]
            for task in tasks:
                task.result()
            spent = time.perf_counter() - began
    return BATCH_IMAGES["cpu"] * times * count / spent


def rate_of_processes(spec: str, size: int, device: str, processes: int) -> float:
    """Return images/s of the pass in so many processes, once they are ready."""
    # All of extraction, which a process whose memory is measured should not have loaded.
    from sfm.pipeline.extract import run_staging

    source = open_source(spec)
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractConfig(
            source=spec, store="none", backbone=["lite0"], image_size=size, device=device, workers=processes
        )
        backbones = {"lite0": load_backbone("lite0", image_size=size, device=device)}
        # A process takes one task at a time: there must be several for each.
        parts = [
            rows
            for task in make_tasks(source, select_by_listed_labels(config, source))
            if task.split == "train" and task.rows is not None
            for rows in np.array_split(task.rows, 4 * processes)
        ]
        tasks = [PartitionTask("train", number, rows) for number, rows in enumerate(parts)]
        staging = Staging(Path(folder))
        with run_staging(config, source, tasks, backbones, staging, PassOptions(), no_progress) as (_, steps):
            return track_pass(steps, tasks, tasks, staging, no_progress).images_per_second


def forward_rates(backbone: Backbone, images: int) -> list[float]:
    """Return images/s of the bare model on normalised batches in memory, on all cores.

    First of the plain loop, one batch after the other on all cores; then, on a CPU, of a batch on each.
    """
    size, device = backbone.card.preprocessing.input_size, backbone.device
    rates, ways = [], [(1, 1, BATCH_IMAGES["cuda"])]
    if device.type == "cpu":
        ways = [(1, torch.get_num_threads(), CHUNK), (count_cores(), 1, choose_batch_size(backbone))]
    for threads, inner, batch in ways:
        pixels = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        before = torch.get_num_threads()
        torch.set_num_threads(inner)

        def one(_: int, pixels: torch.Tensor = pixels) -> None:
            with torch.inference_mode():
                backbone.model(pixels)
                if device.type == "cuda":
                    torch.cuda.synchronize()

        timed(one, threads, threads)
        times = max(threads, images // batch)
        rates.append(times * batch / timed(one, times, threads))
        torch.set_num_threads(before)
    return rates


def against_parts(
    root: Path, kind: str, images: int, rounds: int, device: str, processes: Sequence[int]
) -> dict[str, Any]:
    """Compare the pass with its parts, for one and for two backbones, and in several processes."""
    size = KINDS[kind]
    first, second = (load_backbone(spec, image_size=size, device=device) for spec in ("lite0", "lite1"))
    quick = optimize_for_inference([first, second], "float32")
    source = open_source(make_images(root, kind, images))
    cuda = first.device.type == "cuda"
    found: list[dict[str, float]] = []
    with extraction_runtime(source, first.device.type, count_cores()) as equipment:
        # The first pass waits for processes to start, and for cuDNN to plan.
        size_of_batch = BATCH_IMAGES[first.device.type]
        few = some_of(source, 16 * size_of_batch + len(source.train.labels) % size_of_batch)
        began = time.perf_counter()
        pass_rate(few, [first, second], equipment)
        tell(f"{kind}: a first, short pass by two backbones took {time.perf_counter() - began:.1f} s")
        for _ in range(rounds):
            # Threads of one process cannot decode for a GPU as fast as processes can.
            decoding = decode_rate_of_processes if cuda else decode_rate
            d = decoding(source, first, images)
            bare = forward_rates(first, images)
            own = max(bare), max(forward_rates(second, images))
            # For a GPU, extraction has the model as it is.
            packed = own if cuda else tuple(max(forward_rates(backbone, images)) for backbone in quick)
            tell(f"{kind}: decode {d:.0f}, forward {own[0]:.0f} and {own[1]:.0f} images/s")
            one = pass_rate(source, [first], equipment)
            tell(f"{kind}: pass {one:.0f} images/s")
            two = pass_rate(source, [first, second], equipment)
            tell(f"{kind}: pass of two backbones {two:.0f} images/s")
            each = {"decode": d, "pass": one, "two_backbones": two, "of_plain_loop": one / bare[0]}
            for which, (f0, f1) in (("", own), ("_packed", packed)):
                best = min(d, f0) if cuda else 1 / (1 / d + 1 / f0)
                both = max(1 / d, 1 / f0 + 1 / f1) if cuda else 1 / d + 1 / f0 + 1 / f1
                each |= {
                    f"forward{which}": f0,
                    f"of_possible{which}": one / best,
                    f"two_cost{which}": 1 / two / both,
                }
            found.append(each)
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    several = {n: rate_of_processes(source.spec, size, device, n) for n in processes}
    return {
        "kind": kind,
        "images": images,
        "image_size": size,
        **medians,
        "processes": several,
        "rounds": found,
    }


def plain_loop(source: Source, backbone: Backbone) -> np.ndarray:
    """Compute class means as research code does: a class in memory, then its features, stacked."""
    means = []
    for c in range(CLASSES):
        rows = np.flatnonzero(source.train.labels == c)
        images = torch.stack(
            [
                to_tensor(crop(source.decode(sample.data), backbone.card.preprocessing)[None])[0]
                for sample in source.train.read(rows)
            ]
        )
        with torch.inference_mode():
            chunks = [backbone.features(chunk.to(backbone.device)).cpu() for chunk in images.split(CHUNK)]
        means.append(torch.cat(chunks).double().mean(dim=0))
    return torch.stack(means).numpy()


def ours(source: Source, backbone: Backbone) -> np.ndarray:
    """Compute class means as extraction does."""
    with (
        tempfile.TemporaryDirectory() as folder,
        extraction_runtime(source, backbone.device.type, count_cores()) as equipment,
    ):
        _, gathered, staging = run_pass(source, [backbone], Path(folder), equipment)
        train = [p for p in gathered.partitions if p.split == "train"]
        return accumulate_moments(staging.open_features(backbone.card.hash, train), CLASSES, backbone.card.features).mean


def peak_bytes() -> int:
    """Return the most memory this process has had; getrusage would add what its parent had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def child(way: str, spec: str, size: int, device: str) -> None:
    """Measure one way in this process and print the figures."""
    backbone = load_backbone("lite0", image_size=size, device=device)
    source = open_source(spec)
    images = len(source.train.labels) + (len(source.test.labels) if way == "sfm" else 0)
    began = time.perf_counter()
    means = (ours if way == "sfm" else plain_loop)(source, backbone)
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {"rate": images / seconds, "peak_bytes": peak_bytes(), "mean": float(np.abs(means).mean())}
        )
    )


def measured(size: int, *arguments: str) -> Any:
    """Measure in a process of its own, with the heap that the command line chooses for the image size."""
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | (ONE_HEAP if size > LARGE_INPUT else {})
    out = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    # A process that ran out of memory prints nothing, which says enough.
    return json.loads(out.stdout) if out.returncode == 0 else None


def against_plain_loop(root: Path, kind: str, sizes: Sequence[int], device: str) -> list[dict[str, Any]]:
    """Measure both ways at each number of images, each in a process of its own."""
    rows = []
    size = KINDS[kind]
    for images in sizes:
        spec = make_images(root, kind, images)
        row: dict[str, Any] = {"kind": kind, "images": images}
        for way in ("plain", "sfm"):
            row[way] = measured(size, "--child", way, spec, str(size), "--device", device)
            tell(f"{kind}, {images} images, {way}: {row[way]}")
        rows.append(row)
    return rows


def flows_in_bf16(root: Path, images: int, device: str) -> float:
    """Return the cosine between the flows of class means from bf16 and from float32 forwards."""
    backbone = load_backbone("lite0", image_size=224, device=device)
    source = open_source(make_images(root, "jpeg", images))
    flows = []
    for precision in ("float32", "bf16"):
        with (
            tempfile.TemporaryDirectory() as folder,
            extraction_runtime(source, backbone.device.type, count_cores()) as equipment,
        ):
            _, gathered, staging = run_pass(source, [backbone], Path(folder), equipment, precision)
            train = [p for p in gathered.partitions if p.split == "train"]
            rows = staging.open_features(backbone.card.hash, train)
            mean = accumulate_moments(rows, CLASSES, backbone.card.features).mean
            flows.append((mean.sum(axis=0) - mean) / (CLASSES - 1) - mean)
    a, b = (flow.ravel() for flow in flows)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=130)
    table = Table(title=f"The pass against its parts, {result['device']}, {result['count_cores']} cores, images/s")
    for column in ("images", "px", "decode", "pass", "of model(batch) (bar 0.85)", "two backbones",
                   "forward of", "forward", "of possible (bar 0.90)", "cost of two (bar 1.05)"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in result["parts"]:
        for which, name in (("", "the model"), ("_packed", "extraction")):
            given = [
                row["kind"],
                str(row["image_size"]),
                f"{row['decode']:.0f}",
                f"{row['pass']:.0f}",
                f"{row['of_plain_loop']:.2f}",
                f"{row['two_backbones']:.0f}",
            ]
            table.add_row(
                *(given if not which else [""] * len(given)),
                name,
                f"{row['forward' + which]:.0f}",
                f"{row['of_possible' + which]:.2f}",
                f"{row['two_cost' + which]:.2f}",
            )
    console.print(table)
    for row in result["parts"]:
        for count, rate in row["processes"].items():
            console.print(
                f"  {row['kind']}, the pass in {count} processes: {rate:.0f} images/s", highlight=False
            )
    table = Table(title="Against the plain loop: images/s, and peak memory in MiB")
    for column in ("images", "number", "plain loop", "sfm", "plain loop MiB", "sfm MiB"):
        table.add_column(column, justify="right")
    for row in result["plain_loop"]:
        cells = [row["plain"], row["sfm"]]
        rates = ["out of memory" if cell is None else f"{cell['rate']:.0f}" for cell in cells]
        peaks = ["–" if cell is None else f"{cell['peak_bytes'] / 2**20:.0f}" for cell in cells]
        table.add_row(row["kind"], f"{row['images']:,}", *rates, *peaks)
    console.print(table)
    if result["flow_cosine_bf16"] is not None:
        console.print(f"cosine of flows, bf16 against float32: {result['flow_cosine_bf16']:.6f} (bar 0.9999)")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few images, one round: does it run?")
    parser.add_argument(
        "--sizes", default="1000,6000,60000", help="numbers of images for the plain loop; may be none: ''"
    )
    parser.add_argument("--kinds", default="embedded,tiny,jpeg", help="which images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1200, help="per round, against the parts")
    parser.add_argument(
        "--processes", default="", help="numbers of processes for the pass besides one, e.g. 4,8"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.parts:
        folder, kind, images, rounds = given.parts
        processes = [int(part) for part in given.processes.split(",") if part]
        found = against_parts(Path(folder), kind, int(images), int(rounds), given.device, processes)
        print(json.dumps(found))
        return
    if given.child:
        child(given.child[0], given.child[1], int(given.child[2]), given.device)
        return
    kinds = given.kinds.split(",")
    sizes = [64, 128] if given.quick else [int(part) for part in given.sizes.split(",") if part]
    images, rounds = (96, 1) if given.quick else (given.images, given.rounds)
    cuda = torch.cuda.is_available() and given.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        result: dict[str, Any] = {
            "benchmark": "extraction",
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "cores": count_cores(),
            "torch": torch.__version__,
            "parts": [],
            "plain_loop": [],
            "flow_cosine_bf16": None,
        }
        for kind in kinds:
            arguments = ["--parts", folder, kind, str(images), str(rounds), "--device", given.device]
            found = measured(KINDS[kind], *arguments, "--processes", given.processes)
            result["parts"].append(found)
            write(result, given.json)
        for kind in kinds:
            if kind != "embedded":
                result["plain_loop"] += against_plain_loop(root, kind, sizes, given.device)
                write(result, given.json)
        if cuda:
            result["flow_cosine_bf16"] = flows_in_bf16(root, min(10 * images, FLOW_IMAGES), given.device)
    show(result)
    write(result, given.json)


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write what is known so far, if it is asked for."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
