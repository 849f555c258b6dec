"""Images/s of extraction's pass and of its parts: decoding, and the backbone's forward pass."""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput.image_folders import N_UNIQUE_IMAGES

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.card import Preprocessing
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.events import no_progress
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import run_and_track_pass, stage_tasks
from sfm.pipeline.partition_tasks import PartitionTask, make_tasks
from sfm.pipeline.pass_result import collect_pass_result
from sfm.pipeline.runtime import (
    BATCH_IMAGES,
    ExtractionRuntime,
    choose_forward_batch_size,
    count_cores,
    optimize_for_inference,
)
from sfm.pipeline.selection import select_samples_if_labels_known
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.staging import Staging

PLAIN_BATCH = 64
"""Batch size of the plain loop."""

_START_BARRIER: list[Barrier] = []
"""In a process that decodes: where it waits for the others."""


def run_extraction_pass(
    source: Source,
    backbones: Sequence[Backbone],
    folder: Path,
    runtime: ExtractionRuntime,
    precision: str = "float32",
) -> Any:
    """Run the pass over the images; return its costs, what was gathered, and the staging folder."""
    config = ExtractConfig(source=source.spec, store="none", backbone=["lite0"])
    tasks, staging = make_tasks(source, select_samples_if_labels_known(config, source)), Staging(folder)
    rules = PassOptions(precision="bf16" if precision == "bf16" else "float32")
    steps = stage_tasks(source, tasks, optimize_for_inference(backbones, precision), staging, rules, runtime)
    cost = run_and_track_pass(steps, tasks, tasks, staging, no_progress)
    return cost, collect_pass_result(config, source, tasks, staging), staging


def measure_pass_rate(source: Source, backbones: Sequence[Backbone], runtime: ExtractionRuntime) -> float:
    """Return images/s of the extraction pass."""
    with tempfile.TemporaryDirectory() as folder:
        return float(run_extraction_pass(source, backbones, Path(folder), runtime)[0].images_per_second)


def time_calls(call: Callable[[int], object], count: int, threads: int) -> float:
    """Return the seconds of `count` calls on `threads` threads; a single one is the main thread.

    The main thread has the fastest heap.
    """
    if threads == 1:
        start = time.perf_counter()
        for i in range(count):
            call(i)
        return time.perf_counter() - start
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(call, range(count)))
        return time.perf_counter() - start


def measure_decode_rate(source: Source, backbone: Backbone, images: int) -> float:
    """Return images/s of decode + resize from memory, on all cores, one batch at a time on each."""
    data = [sample.data for sample in source.train.read(np.arange(min(images, N_UNIQUE_IMAGES)))]
    size = BATCH_IMAGES["cpu"]

    def decode_batch(batch: int) -> None:
        for i in range(size * batch, size * batch + size):
            resize_and_crop_image(source.decode(data[i % len(data)]), backbone.card.preprocessing)

    batches = max(count_cores(), images // size)
    return batches * size / time_calls(decode_batch, batches, count_cores())


def decode_batches(spec: str, preprocessing: Preprocessing, batches: int, timeout: int) -> None:
    """Decode and resize some batches in this process, once all processes are ready."""
    source, data = read_encoded_images(spec)
    _START_BARRIER[0].wait(timeout)
    for i in range(BATCH_IMAGES["cpu"] * batches):
        resize_and_crop_image(source.decode(data[i % len(data)]), preprocessing)


def set_start_barrier(barrier: Barrier) -> None:
    """Set the barrier at which this process waits for the others."""
    _START_BARRIER.append(barrier)


@lru_cache(maxsize=1)
def read_encoded_images(spec: str) -> tuple[Source, list[bytes]]:
    """Open a source and read some of its encoded images, once per process."""
    source = open_source(spec)
    return source, [sample.data for sample in source.train.read(np.arange(N_UNIQUE_IMAGES))]


def measure_process_decode_rate(source: Source, backbone: Backbone, images: int) -> float:
    """Return images/s of decode + resize from memory, in a process per core that shares no lock."""
    count, context = count_cores(), get_context("fork")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, set_start_barrier, (barrier,)) as pool:
        # In the first round processes start and open the source. They wait for each other, so that each takes
        # one task.
        for batches, timeout in ((1, 600), (max(1, images // (BATCH_IMAGES["cpu"] * count)), 60)):
            start = time.perf_counter()
            task = (decode_batches, source.spec, backbone.card.preprocessing, batches, timeout)
            for future in [pool.submit(*task) for _ in range(count)]:
                future.result()
            seconds = time.perf_counter() - start
    return BATCH_IMAGES["cpu"] * batches * count / seconds


def measure_multiprocess_rate(spec: str, size: int, device: str, processes: int) -> float:
    """Return images/s of the extraction pass in several processes, once they are ready."""
    # Loads all of extraction, which a process whose memory is measured should not.
    from sfm.pipeline.extract import pass_increment_stream

    source = open_source(spec)
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractConfig(
            source=spec, store="none", backbone=["lite0"], image_size=size, device=device, workers=processes
        )
        backbones = {"lite0": load_backbone("lite0", image_size=size, device=device)}
        # A process takes one task at a time, so it needs several.
        parts = [
            rows
            for task in make_tasks(source, select_samples_if_labels_known(config, source))
            if task.split == "train" and task.positions_in_split is not None
            for rows in np.array_split(task.positions_in_split, 4 * processes)
        ]
        tasks = [PartitionTask("train", number, rows) for number, rows in enumerate(parts)]
        staging = Staging(Path(folder))
        with pass_increment_stream(config, source, tasks, backbones, staging, PassOptions(), no_progress) as (
            _,
            steps,
        ):
            return run_and_track_pass(steps, tasks, tasks, staging, no_progress).images_per_second


def measure_forward_rates(backbone: Backbone, images: int) -> list[float]:
    """Return images/s of the model on normalised batches in memory, on all cores.

    The first rate is that of the plain loop: one batch after the other, on all cores. On a CPU, the second is
    that of one batch on each core.
    """
    size, device = backbone.card.preprocessing.input_size, backbone.device
    rates, settings = [], [(1, 1, BATCH_IMAGES["cuda"])]
    if device.type == "cpu":
        settings = [
            (1, torch.get_num_threads(), PLAIN_BATCH),
            (count_cores(), 1, choose_forward_batch_size(backbone)),
        ]
    for threads, torch_threads, batch in settings:
        pixels = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        before = torch.get_num_threads()
        torch.set_num_threads(torch_threads)

        def run_model(_: int, pixels: torch.Tensor = pixels) -> None:
            with torch.inference_mode():
                backbone.model(pixels)
                if device.type == "cuda":
                    torch.cuda.synchronize()

        time_calls(run_model, threads, threads)
        batches = max(threads, images // batch)
        rates.append(batches * batch / time_calls(run_model, batches, threads))
        torch.set_num_threads(before)
    return rates
