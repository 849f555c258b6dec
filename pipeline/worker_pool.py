"""Stage tasks on Dask workers, on this machine or on a cluster.

Workers write to the staging folder themselves, with the same code as a single process, so the files do not
depend on which worker wrote them. One process computes the statistics from those files, in one order.
That is why an entry's digest does not depend on the number of workers.
"""

import functools
import os
import platform
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
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
    wait,
)
from distributed.client import Future

from sfm.backbones.build import Backbone
from sfm.backbones.execution.allocator import LARGE_INPUT, SINGLE_HEAP_ENVIRONMENT
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback
from sfm.pipeline import dask_worker
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.dask_worker import (
    WorkerConfig,
    check_worker_and_get_device_type,
    release_worker_resources,
    stage_task,
)
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import PassIncrement
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.runtime import count_cores
from sfm.pipeline.scheduler_errors import explain_scheduler_error
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import IncompleteExtractionError, Staging
from sfm.text import get_first_error_line

FEATURE_PACKAGES = ("sfm-distill", "torch", "timm", "pillow")
"""Packages that features depend on: workers must have the same versions."""

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerPool:
    """Checked workers of an extraction.

    Attributes
    ----------
    worker_config : WorkerConfig
    client : Client
    device_type : str
        Kind of the workers' devices.
    """

    worker_config: WorkerConfig
    client: Client
    device_type: str

    def stage_tasks(self, tasks: Sequence[PartitionTask]) -> Generator[PassIncrement, None, None]:
        """Stage tasks on the workers; tasks of a lost worker are retried on others.

        Raises
        ------
        InputError
            As in :func:`sfm.pipeline.feature_pass.stage_tasks`.
        IncompleteExtractionError
            If the cluster is lost, or several workers died on a task.
        """
        # Submit one by one: a map would send all tasks as one large graph.
        futures = [self.client.submit(stage_task, self.worker_config, task, pure=False) for task in tasks]
        task_names = {future.key: task.name for future, task in zip(futures, tasks, strict=True)}
        done = 0
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except KilledWorker as error:
                    raise IncompleteExtractionError(
                        f"several workers died on partition {task_names[future.key]}, perhaps out of memory; "
                        f"{done} of {len(tasks)} partitions are complete: the same command resumes from there"
                    ) from error
                except (CancelledError, OSError) as error:
                    if isinstance(error, OSError) and self.client.status == "running":
                        raise
                    raise IncompleteExtractionError(
                        f"the Dask scheduler was lost after {done} of {len(tasks)} partitions: the same "
                        f"command, with a new scheduler or without one, resumes from there"
                    ) from error
                done += 1
        finally:
            self.client.cancel(futures)


@contextmanager
def worker_pool(
    config: ExtractConfig,
    source: Source,
    backbones_by_spec: Mapping[str, Backbone],
    staging: Staging,
    options: PassOptions,
    progress: ProgressCallback,
) -> Iterator[WorkerPool]:
    """Start workers on this machine, or connect to those of a scheduler, and check them.

    Parameters
    ----------
    backbones_by_spec : mapping of str to Backbone

    Raises
    ------
    InputError
        If there is no worker, or one has other versions, other weights, another source or another staging
        folder than this process; nothing has been extracted then.
    """
    local = config.scheduler is None
    count = config.workers or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    worker_config = WorkerConfig(
        source_spec=config.source,
        client_split_listing_digests=tuple(split.listing_digest for split in source.splits.values()),
        backbone_specs_and_hashes=tuple(
            (spec, backbone.card.hash) for spec, backbone in backbones_by_spec.items()
        ),
        image_size=config.image_size,
        device=config.device,
        staging_folder=str(staging.root.resolve()),
        options=options,
        cores_per_worker=max(1, (config.threads or count_cores()) // count) if local else None,
        local_gpus_to_share=tuple(visible.split(",")) if local and visible and config.device != "cpu" else (),
    )
    large = (
        max(backbone.card.preprocessing.input_size for backbone in backbones_by_spec.values()) > LARGE_INPUT
    )
    connection = (
        local_cluster_client(count, large) if config.scheduler is None else scheduler_client(config.scheduler)
    )
    with connection as client:
        thread_counts = client.nthreads()
        link = f", dashboard {client.dashboard_link}" if client.dashboard_link else ""
        progress(Progress("starting", 0, len(thread_counts), f"workers{link}"))
        for address, versions in run_on_each_worker(client, make_package_version_query()).items():
            require_same_versions(address, versions)
        staging_check_file_name = f"probe-{uuid.uuid4().hex}"
        write_staging_check_file(staging, staging_check_file_name)
        check = functools.partial(check_worker_and_get_device_type, worker_config, staging_check_file_name)
        devices = run_on_each_worker(client, check)
        kinds = sorted(set(devices.values()))
        if len(kinds) > 1:
            raise InputError(f"some workers use {kinds[0]} and some {kinds[1]}: choose one with --device")
        progress(Progress("starting", len(thread_counts), len(thread_counts), f"workers{link}"))
        try:
            yield WorkerPool(worker_config, client, kinds[0])
        finally:
            if not local:
                # Do not wait: a worker may be staging a partition, or the cluster may be lost.
                with suppress(OSError, RuntimeError):
                    for address in client.nthreads():
                        fire_and_forget(
                            client.submit(release_worker_resources, workers=[address], pure=False)
                        )


@contextmanager
def local_cluster_client(worker_count: int, share_heap_among_threads: bool) -> Iterator[Client]:
    """Start workers on this machine, each a process that takes one task at a time, and connect to them.

    Parameters
    ----------
    worker_count : int
    share_heap_among_threads : bool
        Whether images are so large that each worker's threads should share a heap.
    """
    environment = (
        {"distributed.nanny.pre-spawn-environ": SINGLE_HEAP_ENVIRONMENT} if share_heap_among_threads else {}
    )
    with (
        dask.config.set(environment),
        LocalCluster(
            n_workers=worker_count,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
            preload=[dask_worker.__name__],
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(worker_count)
        yield client


@contextmanager
def scheduler_client(address: str) -> Iterator[Client]:
    """Connect to a scheduler that has workers.

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


def run_on_each_worker(client: Client, function: Callable[[], Any]) -> dict[str, Any]:
    """Call a function once on every worker, outside its event loop; return the results by address.

    Raises
    ------
    InputError
        If a worker cannot be called, or the function raises; names the worker.
    """
    futures: dict[str, Future[Any]] = {
        address: client.submit(function, workers=[address], allow_other_workers=False, pure=False)
        for address in client.nthreads()
    }
    wait(list(futures.values()))
    results = {}
    for address, future in futures.items():
        error = future.exception()
        if error is not None:
            raise InputError(f"worker {address}: {get_first_error_line(error)}") from error
        results[address] = future.result()
    return results


def make_package_version_query() -> Callable[[], dict[str, str]]:
    """Return a function that returns package versions; nested, so that workers without sfm can run it."""
    packages = FEATURE_PACKAGES

    def query_versions() -> dict[str, str]:
        import importlib.metadata

        versions = {}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "missing"
        return versions

    return query_versions


def require_same_versions(worker_address: str, worker_versions: Mapping[str, str]) -> None:
    """Refuse a worker whose package versions differ from those here.

    Raises
    ------
    InputError
        With the worker and the packages.
    """
    different = [
        f"{name} {worker_versions[name]} (here {version(name)})"
        for name in FEATURE_PACKAGES
        if worker_versions[name] != version(name)
    ]
    if different:
        raise InputError(
            f"worker {worker_address} has {', '.join(different)}: install the same versions there, or the "
            f"features would not be comparable"
        )


def write_staging_check_file(staging: Staging, file_name: str) -> None:
    """Write a file by which workers check that they share the staging folder."""
    (staging.root / file_name).write_text(platform.node())
