"""Workers on this machine or on a cluster, by Dask: each opens source and backbones once, and takes tasks.

A worker writes what it finds to the staging folder itself, with the code that runs in a single process, so
the same files are there in the end whoever wrote them; all that is summed up is summed up by one process,
from those files, in one order. That is why an entry has the same digest however many workers there were.
"""

import functools
import os
import platform
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import (
    CancelledError,
    Client,
    KilledWorker,
    LocalCluster,
    as_completed,
    fire_and_forget,
    get_worker,
    wait,
)
from distributed.client import Future

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.allocator import LARGE_INPUT, SINGLE_HEAP_ENVIRONMENT, keep_freed_memory
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.features import PassOptions, PassProgress, stage_tasks
from sfm.pipeline.runtime import ExtractionRuntime, count_cores, extraction_runtime, optimize_for_inference
from sfm.pipeline.scheduler_errors import explain_scheduler_error
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.staging import IncompleteExtractionError, PartitionTask, Staging
from sfm.text import summarize_error

FEATURE_PACKAGES = ("sfm-distill", "torch", "timm", "pillow")
"""What features depend on: workers must have the same versions."""

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker needs to know.

    Attributes
    ----------
    source : str
        Spec.
    listing : tuple of str
        Of both splits, as the client sees them.
    backbones : tuple of (str, str)
        Specs, and the hashes that they have where the client is.
    image_size : int or None
    device : str
    staging : str
        Absolute path.
    rules : Rules
    cores : int or None
        For each worker; None: as many as its Dask worker has threads.
    gpus : tuple of str
        Of this machine, shared out among its workers; empty where workers were given their own.
    """

    source: str
    listing: tuple[str, ...]
    backbones: tuple[tuple[str, str], ...]
    image_size: int | None
    device: str
    staging: str
    rules: PassOptions
    cores: int | None
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class WorkerPool:
    """Workers that are fit for an extraction.

    Attributes
    ----------
    order : Order
    client : Client
    device : str
        Kind of the workers' devices.
    """

    order: WorkerConfig
    client: Client
    device: str

    def stage_tasks(self, tasks: Sequence[PartitionTask]) -> Generator[PassProgress, None, None]:
        """Have tasks staged; those of a worker that is lost go to others.

        Raises
        ------
        InputError
            As in :func:`sfm.pipeline.features.stage_tasks`.
        Unfinished
            If the cluster is lost, or a task has cost several workers their lives.
        """
        # One by one: a map would send all of them as one large graph.
        futures = [self.client.submit(stage_task, self.order, task, pure=False) for task in tasks]
        name_of = {future.key: task.name for future, task in zip(futures, tasks, strict=True)}
        done = 0
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except KilledWorker as error:
                    raise IncompleteExtractionError(
                        f"partition {name_of[future.key]} has cost several workers their lives, perhaps for "
                        f"want of memory; {done} of {len(tasks)} partitions were completed: the same command "
                        f"goes on from there"
                    ) from error
                except (CancelledError, OSError) as error:
                    if isinstance(error, OSError) and self.client.status == "running":
                        raise
                    raise IncompleteExtractionError(
                        f"the Dask scheduler went away after {done} of {len(tasks)} partitions: the same "
                        f"command, with a new scheduler or without one, goes on from there"
                    ) from error
                done += 1
        finally:
            self.client.cancel(futures)


@contextmanager
def worker_pool(
    config: ExtractConfig,
    source: Source,
    backbones: Mapping[str, Backbone],
    staging: Staging,
    rules: PassOptions,
    progress: ProgressCallback,
) -> Iterator[WorkerPool]:
    """Start workers on this machine, or reach those of a scheduler, and see that they are fit.

    Parameters
    ----------
    backbones : mapping of str to Backbone
        By the spec that was asked for.

    Raises
    ------
    InputError
        If no worker can be had, or one has other versions, other weights, another view of the source or of
        the staging folder than this process; nothing has been extracted then.
    """
    local = config.scheduler is None
    count = config.workers or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    order = WorkerConfig(
        source=config.source,
        listing=tuple(split.listing for split in source.splits.values()),
        backbones=tuple((spec, backbone.card.hash) for spec, backbone in backbones.items()),
        image_size=config.image_size,
        device=config.device,
        staging=str(staging.root.resolve()),
        rules=rules,
        cores=max(1, (config.threads or count_cores()) // count) if local else None,
        gpus=tuple(visible.split(",")) if local and visible and config.device != "cpu" else (),
    )
    large = max(backbone.card.preprocessing.input_size for backbone in backbones.values()) > LARGE_INPUT
    workers = (
        local_cluster_client(count, large) if config.scheduler is None else scheduler_client(config.scheduler)
    )
    with workers as client:
        known = client.nthreads()
        link = f", dashboard {client.dashboard_link}" if client.dashboard_link else ""
        progress(Progress("starting", 0, len(known), f"workers{link}"))
        run_on_each_worker(client, known, make_version_query(), require_same_versions)
        devices = run_on_each_worker(
            client, known, functools.partial(check_worker, order, write_probe_file(staging)), lambda *_: None
        )
        kinds = sorted(set(devices.values()))
        if len(kinds) > 1:
            raise InputError(f"some workers use {kinds[0]} and some {kinds[1]}: choose one with --device")
        progress(Progress("starting", len(known), len(known), f"workers{link}"))
        try:
            yield WorkerPool(order, client, kinds[0])
        finally:
            if not local:
                # Nobody waits: a worker may have a partition in work; and the cluster may be what is lost.
                with suppress(OSError, RuntimeError):
                    for address in client.nthreads():
                        fire_and_forget(client.submit(release_worker, workers=[address], pure=False))


@contextmanager
def local_cluster_client(workers: int, large: bool) -> Iterator[Client]:
    """Start workers on this machine, each a process that takes one task at a time.

    Parameters
    ----------
    workers : int
    large : bool
        Whether images are so large that each worker's threads should share a heap.
    """
    environment = {"distributed.nanny.pre-spawn-environ": SINGLE_HEAP_ENVIRONMENT} if large else {}
    with (
        dask.config.set(environment),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
            preload=[__name__],
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(workers)
        yield client


def dask_setup(_: Any) -> None:
    """Have a worker on this machine leave Ctrl-C to the process that started it; Dask calls this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def scheduler_client(address: str) -> Iterator[Client]:
    """Reach a scheduler that has workers.

    Raises
    ------
    InputError
        If it does not answer, or has none.
    """
    try:
        # Dask takes certificates from its own configuration.
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(explain_scheduler_error(address, error)) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"the Dask scheduler at {address} has no workers: start some with `dask worker {address}`"
            ) from error
        yield client


def run_on_each_worker(
    client: Client,
    workers: Mapping[str, int],
    call: Callable[[], Any],
    judge: Callable[[str, Any], None],
) -> dict[str, Any]:
    """Call a function once on every worker, outside its event loop, and judge the answers.

    Raises
    ------
    InputError
        If one cannot be called or raises; names the worker.
    """
    futures: dict[str, Future[Any]] = {
        address: client.submit(call, workers=[address], allow_other_workers=False, pure=False)
        for address in workers
    }
    wait(list(futures.values()))
    answers = {}
    for address, future in futures.items():
        error = future.exception()
        if error is not None:
            raise InputError(f"worker {address}: {summarize_error(error)}") from error
        answers[address] = future.result()
        judge(address, answers[address])
    return answers


def make_version_query() -> Callable[[], dict[str, str]]:
    """Return a function that tells versions; nested, so that it travels to workers that lack this package."""
    packages = FEATURE_PACKAGES

    def tell() -> dict[str, str]:
        import importlib.metadata

        found = {}
        for package in packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "missing"
        return found

    return tell


def require_same_versions(worker: str, theirs: Mapping[str, str]) -> None:
    """Refuse a worker whose packages are not those of this process."""
    odd = [
        f"{name} {theirs[name]} (here {version(name)})"
        for name in FEATURE_PACKAGES
        if theirs[name] != version(name)
    ]
    if odd:
        raise InputError(
            f"worker {worker} has {', '.join(odd)}: install the same versions there, or the features would "
            f"not be comparable"
        )


def write_probe_file(staging: Staging) -> str:
    """Write a file to the staging folder that only those who share the folder can read; return its name."""
    name = f"probe-{uuid.uuid4().hex}"
    (staging.root / name).write_text(platform.node())
    return name


TASK_LOCK = threading.RLock()
"""Held while a task is in work: a source's shards are read one at a time in a process."""


def check_worker(order: WorkerConfig, name: str) -> str:
    """Say what kind of device this worker uses, after making sure that it is fit for an order.

    Raises
    ------
    InputError
        If source, backbones or staging folder are not those of the client.
    """
    if not (Path(order.staging) / name).is_file():
        raise InputError(
            f"the staging folder {order.staging} is not shared with this worker: choose a folder on a disk "
            f"that all workers see, with --staging"
        )
    with TASK_LOCK:
        _, backbones, _ = open_worker(order)
    return backbones[0].device.type


OPEN_RUNTIME = ExitStack()
"""Holds the equipment for the order that a worker has in work."""


def release_worker() -> None:
    """Have this worker forget the order that it had in work, and end what it has for it."""
    with TASK_LOCK:
        OPEN_RUNTIME.close()
        open_worker.cache_clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def open_worker(order: WorkerConfig) -> tuple[Source, list[Backbone], ExtractionRuntime]:
    """Open the source and load the backbones of an order, once in the life of a worker.

    Raises
    ------
    InputError
        If they are not what they are to the client.
    """
    release_worker()
    keep_freed_memory()
    if order.gpus and not torch.cuda.is_initialized():
        number = get_worker().name
        os.environ["CUDA_VISIBLE_DEVICES"] = order.gpus[int(number) % len(order.gpus)]
    source = open_source(order.source, held_out=False)
    if tuple(split.listing for split in source.splits.values()) != order.listing:
        raise InputError(
            f"{order.source} is not the same here as where the extraction was started: other files, sizes, "
            f"times or folders"
        )
    backbones = []
    for spec, expected in order.backbones:
        backbone = load_backbone(
            spec,
            image_size=order.image_size,
            device=order.device,
            fold_norms=order.rules.execution != "eager",
        )
        if backbone.card.hash != expected:
            raise InputError(f"backbone {spec} has other weights here than where the extraction was started")
        backbones.append(backbone)
    backbones = optimize_for_inference(backbones, order.rules.precision, order.rules.execution)
    count = int(order.cores or get_worker().state.nthreads)
    return (
        source,
        backbones,
        OPEN_RUNTIME.enter_context(extraction_runtime(source, backbones[0].device.type, count)),
    )


def stage_task(order: WorkerConfig, task: PartitionTask) -> PassProgress:
    """Stage one task on this worker, and tell what it took."""
    with TASK_LOCK:
        source, backbones, equipment = open_worker(order)
        staging = Staging(Path(order.staging))
        spent: Counter[str] = Counter()
        images = skipped = 0
        try:
            for step in stage_tasks(source, [task], backbones, staging, order.rules, equipment):
                spent.update(step.seconds)
                images, skipped = images + step.images, skipped + step.skipped
        except IncompleteExtractionError:
            # A process of the equipment is lost: the next task has it anew.
            release_worker()
            raise
    return PassProgress(images, skipped, 1, dict(spent))
