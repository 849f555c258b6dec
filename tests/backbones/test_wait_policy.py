"""How threads wait for each other is decided before torch is loaded, and only by the command line."""

import os
import subprocess
import sys

import pytest

from sfm.backbones.execution.wait_policy import CoreContentionMonitor, advise_on_threads, are_cores_crowded

WAIT_POLICY_PROGRAM = """
import os
from sfm.backbones.execution import wait_policy
wait_policy.psutil.cpu_percent = lambda *_, **__: [%s] * 1024
wait_policy.set_passive_openmp_wait_if_crowded(%s)
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


def read_wait_policy(share: float, threads: int | None = None, **environment: str) -> str:
    """Return how threads wait in a new process, on a machine whose cores are used so much."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP", "KMP"))}
    code = WAIT_POLICY_PROGRAM % (share, threads)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean | environment
    )
    return done.stdout.strip()


def test_openmp_waits_passively_on_a_busy_machine_and_actively_on_an_idle_one() -> None:
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core has nobody to wait for")
    assert read_wait_policy(100.0) == "PASSIVE None"
    assert read_wait_policy(0.0) == "None None"


def test_a_wait_policy_set_by_the_user_is_kept() -> None:
    assert read_wait_policy(100.0, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert read_wait_policy(100.0, GOMP_SPINCOUNT="7") == "None 7"


def test_a_single_thread_never_waits_passively() -> None:
    assert read_wait_policy(100.0, threads=1) == "None None"
    assert read_wait_policy(100.0, OMP_NUM_THREADS="1") == "None None"


@pytest.mark.parametrize(
    ("threads", "others", "cores", "crowded"),
    [(2, 0.1, 2, False), (2, 1.0, 2, True), (8, 4.0, 16, False), (16, 1.0, 16, True), (1, 9.0, 2, False)],
)
def test_cores_are_crowded_if_threads_and_other_load_exceed_them(
    threads: int, others: float, cores: int, crowded: bool
) -> None:
    assert are_cores_crowded(threads, others, cores) is crowded


def test_a_run_that_waits_for_cores_is_advised_to_use_fewer_threads() -> None:
    assert "try --threads 1" in advise_on_threads(2, 0.5, is_passive_policy=False)
    assert advise_on_threads(2, 0.1, is_passive_policy=False) == ""
    assert advise_on_threads(1, 0.9, is_passive_policy=False) == ""


def test_a_passively_waiting_run_is_advised_when_the_machine_is_idle() -> None:
    assert "--resume is faster" in advise_on_threads(2, 0.0, is_passive_policy=True)
    assert advise_on_threads(2, 0.5, is_passive_policy=True) == ""


def test_thread_advice_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([0.0, 1e9, 2e9])
    monkeypatch.setattr(
        "sfm.backbones.execution.wait_policy.read_thread_core_wait_seconds", lambda: next(waited)
    )
    watch = CoreContentionMonitor(2, interval=0.0)
    assert "other processes want" in watch.advise_once()
    assert watch.advise_once() == ""


def test_no_thread_advice_is_given_without_wait_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfm.backbones.execution.wait_policy.read_thread_core_wait_seconds", lambda: None)
    assert CoreContentionMonitor(2, interval=0.0).advise_once() == ""
