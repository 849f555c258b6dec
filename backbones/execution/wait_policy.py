"""Choose whether waiting OpenMP threads spin or sleep, depending on what other processes use.

By default they spin for milliseconds. On two idle cores that gains `sfm distill` a third over one thread,
where sleeping threads lose a third; beside two busy processes it costs half of the steps of one thread, where
sleeping threads lose nothing (``benchmarks/busy.py``). The policy changes no bit of a result. OpenMP reads it
once, when torch is loaded, so the command line sets it before.
"""

import os
import sys
import time
from pathlib import Path

import psutil

WAIT_POLICY_VARIABLE = "OMP_WAIT_POLICY"
WAIT_POLICY_VARIABLES = (WAIT_POLICY_VARIABLE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SAMPLE_SECONDS = (0.2, 0.5)
"""Seconds over which the load of other processes is sampled; the second sample only if the first is high."""

MIN_EXCESS_CORES = 0.5
"""Threads sleep if this many more cores are in use than exist."""

HIGH_WAIT_SHARE, LOW_WAIT_SHARE = 0.25, 0.02
"""Shares of its time that a run waits for a core: on a busy machine, and on an idle one."""

_chose_passive = False
"""Whether this module made threads sleep."""


def set_passive_openmp_wait_if_crowded(planned_thread_count: int | None = None) -> None:
    """Make waiting threads sleep if other processes use the cores that they would spin on.

    Does nothing if torch is already loaded or the environment sets a wait policy.

    Parameters
    ----------
    planned_thread_count : int, optional
        CPU threads that will compute together; default: one per core, or as OMP_NUM_THREADS says.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAIT_POLICY_VARIABLES):
        return
    process = psutil.Process()
    cores = process.cpu_affinity() if hasattr(process, "cpu_affinity") else list(range(os.cpu_count() or 1))
    declared = os.environ.get("OMP_NUM_THREADS", "")
    needed = planned_thread_count or (int(declared) if declared.isdigit() else 0) or len(cores)
    if needed > 1:
        for seconds in SAMPLE_SECONDS:
            shares = psutil.cpu_percent(seconds, percpu=True)
            others = sum(shares[core] for core in cores if core < len(shares)) / 100
            if not are_cores_crowded(needed, others, len(cores)):
                return
        os.environ[WAIT_POLICY_VARIABLE] = "PASSIVE"
        global _chose_passive
        _chose_passive = True


def are_cores_crowded(thread_count: int, cores_used_by_others: float, core_count: int) -> bool:
    """Return whether threads and the load of other processes exceed the number of cores."""
    return thread_count > 1 and thread_count + cores_used_by_others >= core_count + MIN_EXCESS_CORES


class CoreContentionMonitor:
    """Watch how long a run waits for cores that other processes use, and advise once.

    Linux counts that time for every thread; elsewhere there is no advice.
    """

    def __init__(self, threads: int, interval: float = 20.0) -> None:
        self.threads, self.interval = threads, interval
        self._since, self._waited = time.perf_counter(), read_thread_core_wait_seconds()
        self._advised = False

    def advise_once(self) -> str:
        """Return a line of advice once, if the last interval warrants it; else an empty string."""
        now = time.perf_counter()
        if self._advised or self._waited is None or now - self._since < self.interval:
            return ""
        waited = read_thread_core_wait_seconds() or 0.0
        share = (waited - self._waited) / (now - self._since)
        self._since, self._waited = now, waited
        advice = advise_on_threads(self.threads, share, _chose_passive)
        self._advised = bool(advice)
        return advice


def advise_on_threads(thread_count: int, core_wait_share: float, is_passive_policy: bool) -> str:
    """Return advice for a run that waits for a core in a share of its time; an empty string for none."""
    if thread_count > 1 and is_passive_policy and core_wait_share < LOW_WAIT_SHARE:
        return (
            "this machine was busy when the run began and is not now: Ctrl-C and --resume is faster, with "
            "the same images"
        )
    if thread_count == 1 or core_wait_share < HIGH_WAIT_SHARE or is_passive_policy:
        return ""
    return (
        f"other processes want this machine's cores: {core_wait_share:.0%} of the time goes into waiting "
        f"for one; try --threads 1, or Ctrl-C and --resume, which gives the same images"
    )


def read_thread_core_wait_seconds() -> float | None:
    """Return how many seconds this thread has waited for a core so far; None where that is not counted."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
