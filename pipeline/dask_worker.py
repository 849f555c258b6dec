"""Code that runs in Dask workers: check the worker, open source and backbones once, and stage tasks."""

import functools
import os
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distributed import get_worker

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.errors import InputError
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.feature_pass import PassIncrement, stage_tasks
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.runtime import ExtractionRuntime, extraction_runtime, optimize_for_inference
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.staging import IncompleteExtractionError, Staging


@dataclass(frozen=True)
class WorkerConfig:
    """Configuration that the client sends to every worker.

    Attributes
    ----------
    source_spec : str
        Spec.
    client_split_listing_digests : tuple of str
        `Split.listing_digest` of both splits on the client.
    backbone_specs_and_hashes : tuple of (str, str)
        Specs, and the backbones' hashes on the client.
    image_size : int or None
    device : str
    staging_folder : str
        Absolute path.
    options : PassOptions
    cores_per_worker : int or None
        For each worker; None: as many as its Dask worker has threads.
    local_gpus_to_share : tuple of str
        GPUs of this machine, to be shared among its workers; empty where workers have their own.
    """

    source_spec: str
    client_split_listing_digests: tuple[str, ...]
    backbone_specs_and_hashes: tuple[tuple[str, str], ...]
    image_size: int | None
    device: str
    staging_folder: str
    options: PassOptions
    cores_per_worker: int | None
    local_gpus_to_share: tuple[str, ...]


TASK_LOCK = threading.RLock()
"""Held while a task runs: a source's shards are read one at a time in a process."""

OPEN_RUNTIME = ExitStack()
"""Holds the runtime of the worker's current extraction."""


def dask_setup(_: Any) -> None:
    """Have a worker on this machine ignore Ctrl-C, which its parent process handles; Dask calls this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_worker_and_get_device_type(config: WorkerConfig, staging_check_file_name: str) -> str:
    """Check that this worker sees the client's data and weights, and return its device type.

    Parameters
    ----------
    config : WorkerConfig
    staging_check_file_name : str
        Name of a file that the client wrote to the staging folder.

    Raises
    ------
    InputError
        If source, backbones or staging folder are not those of the client.
    """
    if not (Path(config.staging_folder) / staging_check_file_name).is_file():
        raise InputError(
            f"the staging folder {config.staging_folder} is not shared with this worker: choose a folder "
            f"on a disk that all workers see, with --staging"
        )
    with TASK_LOCK:
        _, backbones, _ = open_worker_resources(config)
    return backbones[0].device.type


def release_worker_resources() -> None:
    """Close the runtime of this worker, and free its source and backbones."""
    with TASK_LOCK:
        OPEN_RUNTIME.close()
        open_worker_resources.cache_clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def open_worker_resources(config: WorkerConfig) -> tuple[Source, list[Backbone], ExtractionRuntime]:
    """Open the source, load the backbones and start the runtime, once per extraction.

    Raises
    ------
    InputError
        If source or backbones are not those of the client.
    """
    release_worker_resources()
    configure_malloc_to_keep_memory()
    if config.local_gpus_to_share and not torch.cuda.is_initialized():
        number = get_worker().name
        os.environ["CUDA_VISIBLE_DEVICES"] = config.local_gpus_to_share[
            int(number) % len(config.local_gpus_to_share)
        ]
    source = open_source(config.source_spec, require_held_out=False)
    if tuple(split.listing_digest for split in source.splits.values()) != config.client_split_listing_digests:
        raise InputError(
            f"{config.source_spec} is not the same here as where the extraction was started: other files, "
            f"sizes, times or folders"
        )
    backbones = []
    for spec, expected_hash in config.backbone_specs_and_hashes:
        backbone = load_backbone(
            spec,
            image_size=config.image_size,
            device=config.device,
            fold_norms=config.options.execution != "eager",
        )
        if backbone.card.hash != expected_hash:
            raise InputError(f"backbone {spec} has other weights on this worker than on the client")
        backbones.append(backbone)
    backbones = optimize_for_inference(backbones, config.options.precision, config.options.execution)
    cores = int(config.cores_per_worker or get_worker().state.nthreads)
    runtime = extraction_runtime(source, backbones[0].device.type, cores)
    return source, backbones, OPEN_RUNTIME.enter_context(runtime)


def stage_task(config: WorkerConfig, task: PartitionTask) -> PassIncrement:
    """Stage one task on this worker, and return its progress report."""
    with TASK_LOCK:
        source, backbones, runtime = open_worker_resources(config)
        staging = Staging(Path(config.staging_folder))
        seconds: Counter[str] = Counter()
        images = skipped = 0
        try:
            for step in stage_tasks(source, [task], backbones, staging, config.options, runtime):
                seconds.update(step.thread_seconds_by_stage)
                images, skipped = images + step.image_count, skipped + step.skipped_count
        except IncompleteExtractionError:
            # A decoding process is lost: the next task starts a new runtime.
            release_worker_resources()
            raise
    return PassIncrement(images, skipped, 1, dict(seconds))
