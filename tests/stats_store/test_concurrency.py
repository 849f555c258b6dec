"""Requests side by side: bounded, in order, and over at once when somebody interrupts."""

import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_faults import Proxy, run_fault_proxy
from toy_entries import make_backbone_card, publish_random_entry
from typer.testing import CliRunner

from sfm.cli import app
from sfm.events import Progress, hide_progress_of_short_stages
from sfm.stats_store.concurrency import MAX_REQUESTS, MemoryBudget, map_concurrently
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import find_entries_merged_from_removed
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

LATENCY = 0.05


@pytest.fixture
def proxy(s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that everything goes through, and that delays nothing until it is told to."""
    with run_fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
        proxy.latency = 0.0


@pytest.fixture
def slow_store(proxy: Proxy, s3_url: str, tmp_path: Path) -> Store:
    """A store of five entries on a server that takes its time."""
    near = open_or_create_store(str(tmp_path / "near"))
    for number in range(5):
        publish_random_entry(
            near, number, backbone=make_backbone_card(f"lite{number}"), dataset=f"set{number}"
        )
    copy_entries(near, open_or_create_store(s3_url), near.list_summaries())
    proxy.latency, proxy.most = LATENCY, 0
    return open_store(s3_url)


def send_sigint_soon() -> None:
    """Press Ctrl-C in a moment."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_map_concurrently_keeps_input_order_and_monotonic_progress() -> None:
    told: list[Progress] = []
    assert map_concurrently(lambda n: n * n, range(50), told.append, "square", "numbers") == [
        n * n for n in range(50)
    ]
    assert (told[0].done, told[-1].done, {event.total for event in told}) == (0, 50, {50})
    assert [event.done for event in told] == sorted({event.done for event in told})
    assert map_concurrently(str, []) == []


def test_map_concurrently_limits_concurrent_calls_to_max_threads() -> None:
    together = threading.Barrier(3)
    most, under_way, lock = 0, 0, threading.Lock()

    def call(_: int) -> None:
        nonlocal most, under_way
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(timeout=20)
        with lock:
            under_way -= 1

    map_concurrently(call, range(12), max_threads=3)
    assert most == 3


def test_map_concurrently_raises_the_first_error_and_starts_no_further_call() -> None:
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError):
        map_concurrently(fail, range(100), max_threads=2)
    assert len(begun) <= 2


def test_map_concurrently_does_not_wait_for_running_calls_on_interrupt() -> None:
    over = threading.Event()
    send_sigint_soon()
    with pytest.raises(KeyboardInterrupt):
        map_concurrently(lambda _: over.wait(60), range(100))
    over.set()


def test_memory_budget_admits_an_oversized_request_only_when_empty() -> None:
    budget = MemoryBudget(10)
    assert (budget.acquire(4), budget.acquire(6)) == (4, 6)
    waiting = threading.Thread(target=budget.acquire, args=(99,), daemon=True)
    waiting.start()
    budget.release(4)
    assert waiting.is_alive()
    budget.release(6)
    waiting.join(20)
    assert not waiting.is_alive()


def test_progress_of_short_stages_is_hidden() -> None:
    told: list[Progress] = []
    for seconds in (0.0, 1000.0):
        listen = hide_progress_of_short_stages(seconds, told.append)
        listen(Progress("copy", 0, 2))
        listen(Progress("copy", 2, 2))
    assert [event.done for event in told] == [0, 2]


def test_entries_objects_and_commits_are_requested_concurrently(slow_store: Store, proxy: Proxy) -> None:
    summaries = slow_store.list_summaries()
    assert proxy.most == len(summaries)
    proxy.most = 0
    assert [v.is_sound for v in verify_entries(slow_store)] == [True] * len(summaries)
    assert len(summaries) < proxy.most <= MAX_REQUESTS
    proxy.most = 0
    done = copy_entries(slow_store, open_or_create_store(f"{slow_store.url}-copy"), summaries[:4])
    assert {c.outcome for c in done} == {"copied"}
    assert 4 < proxy.most <= MAX_REQUESTS


def test_finding_merged_entries_costs_two_requests_per_other_entry_of_the_backbone(
    s3_url: str, proxy: Proxy
) -> None:
    store = open_or_create_store(s3_url)
    for number in range(3):
        publish_random_entry(store, number, dataset=f"set{number}", fingerprint=f"{number:064x}")
    summaries = store.list_summaries()
    proxy.seen.clear()
    assert find_entries_merged_from_removed(store, summaries, summaries[:1]) == []
    assert len(proxy.seen) == 2 * 2


@pytest.mark.parametrize("words", [["ls"], ["show", "toy"], ["verify"], ["gc", "--dry-run"]])
def test_interrupted_read_only_command_reports_that_nothing_was_changed(
    s3_url: str, proxy: Proxy, words: list[str]
) -> None:
    open_or_create_store(s3_url)
    proxy.latency = 20.0
    send_sigint_soon()
    done = CliRunner().invoke(app, ["store", words[0], s3_url, *words[1:]])
    proxy.latency = 0.0
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.startswith("error: interrupted: nothing was changed")
    assert done.stderr.count("\n") == 1


def test_concurrent_gc_keeps_the_current_entry_sound(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    for number in range(6):
        publish_random_entry(store, number, replace=True)
    done = map_concurrently(
        lambda _: collect_garbage(store, min_age=datetime.timedelta(0)), range(3), max_threads=3
    )
    assert all(not found.notes for found in done)
    assert len({garbage.path for found in done for garbage in found.deleted}) == 5
    assert [v.is_sound for v in verify_entries(store)] == [True]


WRITE = """
import sys
import numpy as np
from sfm.stats_store.location import connect_object_store
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store
draft = Draft(Store(sys.argv[1], connect_object_store(sys.argv[1])))
print("writing", flush=True)
draft.write_array("train/count", np.arange(3))
"""


def test_interrupted_writer_does_not_wait_for_a_stalled_server(proxy: Proxy, s3_url: str) -> None:
    proxy.latency = 100.0
    command = [sys.executable, "-c", WRITE, s3_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout
            assert writer.stdout.readline() == "writing\n"
            while not proxy.seen and not proxy.under_way:
                time.sleep(0.01)
            writer.send_signal(signal.SIGINT)
            _, printed = writer.communicate(timeout=30)
        finally:
            writer.kill()
    assert "KeyboardInterrupt" in printed
