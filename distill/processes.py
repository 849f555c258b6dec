"""A run in several processes on this machine: started, watched and ended together."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from sfm.backbones.execution.allocator import keep_freed_memory
from sfm.distill.group import LostProcess, Place
from sfm.distill.stopping import Interrupted, stop_requests
from sfm.errors import DamageError, InputError
from sfm.events import Progress, ProgressCallback, no_progress

Result = TypeVar("Result")

Work = Callable[[Place, ProgressCallback], Result]

LISTEN_SECONDS = 0.2
"""How long a request to stop may wait to be passed on while no process says anything."""


def side_by_side(work: Work[Result], count: int, progress: ProgressCallback) -> Result:
    """Do a piece of work in several new processes, which share the threads of this one.

    They have sessions of their own, so that Ctrl-C reaches this process alone: it asks the first to stop, and
    the processes agree among themselves on when. When one ends before its work is done, or this one does, all
    are ended.

    Parameters
    ----------
    work : callable
        Called with a place and a listener in each process; what the first one's returns or raises counts.
        Must be picklable.
    count : int
        How many processes.
    progress : Listener
        Told what the first process's work tells its listener.

    Raises
    ------
    InputError
        If a process ends before its work is done; else what the work raises.
    """
    threads = max(1, torch.get_num_threads() // count)
    started: dict[Connection, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder, stop_requests() as stop_requested:
        meeting = (Path(folder) / "meeting").as_uri()
        try:
            for rank in range(count):
                connection, process = _start()
                started[connection] = process
                connection.send((work, Place(rank, count, rank, meeting), threads))
            result: Result = _outcome(started, progress, stop_requested)
            return result
        finally:
            for process in started.values():
                process.kill()
                process.wait()


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start a process that waits for its part of the work; it finds modules where this one does."""
    ours, theirs = Pipe()
    path = os.pathsep.join(folder or "." for folder in sys.path)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sfm.distill.processes", str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return ours, process


def _outcome(
    processes: dict[Connection, "subprocess.Popen[bytes]"],
    progress: ProgressCallback,
    stop_requested: Callable[[], bool],
) -> Any:
    """Pass on progress and a request to stop until all processes have said what became of their work."""
    everyone = list(processes)
    outcomes: dict[Connection, Any] = {}
    asked = False
    while len(outcomes) < len(everyone):
        if stop_requested() and not asked:
            processes[everyone[0]].terminate()
            asked = True
        for connection in wait([each for each in everyone if each not in outcomes], LISTEN_SECONDS):
            assert isinstance(connection, Connection)
            try:
                news = connection.recv()
            except (EOFError, ConnectionResetError):
                code = processes[connection].wait()
                if asked and code == -signal.SIGTERM:
                    raise KeyboardInterrupt from None
                end = (
                    f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                )
                raise InputError(
                    f"process {everyone.index(connection)} of {len(everyone)} {end}, and the others cannot "
                    "go on without it: repeat the command with --resume"
                ) from None
            if isinstance(news, Progress):
                progress(news)
            elif isinstance(news, Exception) and not isinstance(news, LostProcess | Interrupted):
                raise news
            else:
                # One that only misses another waits here for what that one has to say.
                outcomes[connection] = news
    outcome = outcomes[everyone[0]]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def take_part(connection: Connection) -> None:
    """Do this process's part of the work that comes by a connection, and send back what became of it."""
    keep_freed_memory()
    work, place, threads = connection.recv()
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        outcome = work(place, connection.send if place.rank == 0 else no_progress)
    except (InputError, DamageError, Interrupted, OSError) as error:
        outcome = error
    connection.send(outcome)


def _end_with(connection: Connection) -> None:
    """End this process when the one that started it has ended: it sends nothing more before."""
    wait([connection])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    take_part(Connection(int(sys.argv[1])))
