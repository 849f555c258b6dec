"""How threads that compute together wait for each other, where other processes want the same cores.

By default OpenMP threads spin for milliseconds. On two idle cores that gains `sfm distill` a third over one
thread, where threads that sleep lose a third; beside two busy processes it costs half of the steps of one
thread, where threads that sleep lose nothing (``benchmarks/busy.py``). How they wait changes no bit of a
result. The library of threads reads it once, when torch is loaded, so the command line decides it before.
"""

import os
import sys
import time
from pathlib import Path

import psutil

POLICY = "OMP_WAIT_POLICY"
CHOSEN_BY_USER = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LOOKS = (0.2, 0.5)
"""Seconds to look at what other processes use, before torch is loaded: again only if they use much."""

WANTED = 0.5
"""Cores that others use beyond those that are left over, from which on threads had better sleep."""

MUCH, LITTLE = 0.25, 0.02
"""Shares of its time that a run waits for a core: on a busy machine, and on one that it has for itself."""

_sleeping = False
"""Whether threads sleep because this module chose so."""


def choose_wait_policy(threads: int | None = None) -> None:
    """Let threads that wait sleep rather than spin, if other processes use the cores that they would take.

    Does nothing where torch is loaded already, or the environment says how to wait.

    Parameters
    ----------
    threads : int, optional
        That will compute together; default: as many as there are cores, or as OMP_NUM_THREADS says.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOSEN_BY_USER):
        return
    ours = psutil.Process()
    cores = ours.cpu_affinity() if hasattr(ours, "cpu_affinity") else list(range(os.cpu_count() or 1))
    told = os.environ.get("OMP_NUM_THREADS", "")
    wanted = threads or (int(told) if told.isdigit() else 0) or len(cores)
    if wanted > 1:
        for seconds in LOOKS:
            shares = psutil.cpu_percent(seconds, percpu=True)
            others = sum(shares[core] for core in cores if core < len(shares)) / 100
            if not is_crowded(wanted, others, len(cores)):
                return
        os.environ[POLICY] = "PASSIVE"
        global _sleeping
        _sleeping = True


def is_crowded(threads: int, others: float, cores: int) -> bool:
    """Say whether threads and what other processes use come to more than the cores there are."""
    return threads > 1 and threads + others >= cores + WANTED


class CoreWatch:
    """Tells when a run spends much of its time waiting for a core that other processes have.

    Linux counts that time for every thread; elsewhere nothing is told.
    """

    def __init__(self, threads: int, every: float = 20.0) -> None:
        self.threads, self.every = threads, every
        self._since, self._waited = time.perf_counter(), seconds_waited()
        self._told = False

    def look(self) -> str:
        """Return one line for the user, once, if the last seconds were such; else nothing."""
        now = time.perf_counter()
        if self._told or self._waited is None or now - self._since < self.every:
            return ""
        waited = seconds_waited() or 0.0
        share = (waited - self._waited) / (now - self._since)
        self._since, self._waited = now, waited
        found = advice(self.threads, share, _sleeping)
        self._told = bool(found)
        return found


def advice(threads: int, share: float, sleeping: bool) -> str:
    """Return what to say to a run of several threads that waits for a core in a share of its time."""
    if threads > 1 and sleeping and share < LITTLE:
        return (
            "this machine was busy when the run began and is not now: Ctrl-C and --resume is faster, with "
            "the same images"
        )
    if threads == 1 or share < MUCH or sleeping:
        return ""
    return (
        f"other processes want this machine's cores: {share:.0%} of the time goes into waiting for one; "
        f"try --threads 1, or Ctrl-C and --resume, which gives the same images"
    )


def seconds_waited() -> float | None:
    """Return how long this thread has waited for a core so far; None where that is not counted."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
