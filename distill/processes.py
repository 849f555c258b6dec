"""A run in several processes on this machine: started, watched and ended together."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from sfm.distill.group import LostProcess, Place
from sfm.distill.stopping import Interrupted, stop_requests
from sfm.errors import DamageError, InputError
from sfm.events import Listener, Progress, nobody

Result = TypeVar("Result")

Work = Callable[[Place, Listener], Result]

LISTEN_SECONDS = 0.2
"""How long a request to stop may wait to be passed on while no process says anything."""


def side_by_side(work: Work[Result], count: int, progress: Listener) -> Result:
    """Do a piece of work in several new processes, which share the threads of this one.

    They have sessions of their own, so that Ctrl-C reaches this process alone: it asks the first to stop, and
    the processes agree among themselves on when. When one ends before its work is done, or this one does, all
    are ended.

    Parameters
    ----------
    work : callable
        Called with a place and a listener in each process; what the first one's returns or raises counts.
        Must be picklable. As ever with new processes, a script that comes here needs its
        ``if __name__ == "__main__"``.
    count : int
        How many processes.
    progress : Listener
        Told what the first process's work tells its listener.

    Raises
    ------
    InputError
        If a process ends before its work is done; else what the work raises.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    started: dict[Connection, BaseProcess] = {}
    with tempfile.TemporaryDirectory() as folder, stop_requests() as stop_requested:
        meeting = (Path(folder) / "meeting").as_uri()
        try:
            for rank in range(count):
                receiving, sending = context.Pipe(duplex=False)
                place = Place(rank, count, rank, meeting)
                process: BaseProcess = context.Process(
                    target=_take_part, args=(work, place, threads, sending), name=f"process {rank} of {count}"
                )
                # Held back from a child until it is in its own session.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                sending.close()
                started[receiving] = process
            result: Result = _outcome(started, progress, stop_requested)
            return result
        finally:
            for process in started.values():
                process.kill()
                process.join()


def _outcome(
    processes: dict[Connection, BaseProcess], progress: Listener, stop_requested: Callable[[], bool]
) -> Any:
    """Pass on progress and a request to stop until all processes have said what became of their work."""
    first, *_ = processes
    outcomes: dict[Connection, Any] = {}
    asked = False
    while len(outcomes) < len(processes):
        if stop_requested() and not asked:
            processes[first].terminate()
            asked = True
        for connection in wait([each for each in processes if each not in outcomes], LISTEN_SECONDS):
            assert isinstance(connection, Connection)
            try:
                news = connection.recv()
            except EOFError:
                process = processes[connection]
                process.join()
                if asked and process.exitcode == -signal.SIGTERM:
                    raise KeyboardInterrupt from None
                raise InputError(
                    f"{process.name} {_end(process)}, and the others cannot go on without it: "
                    "repeat the command with --resume"
                ) from None
            if isinstance(news, Progress):
                progress(news)
            elif isinstance(news, Exception) and not isinstance(news, LostProcess | Interrupted):
                raise news
            else:
                # One that only misses another waits here for what that one has to say.
                outcomes[connection] = news
    outcome = outcomes[first]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _take_part(work: Work[Result], place: Place, threads: int, connection: Connection) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        outcome: Result | Exception = work(place, connection.send if place.rank == 0 else nobody)
    except (InputError, DamageError, Interrupted, OSError) as error:
        outcome = error
    connection.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _end(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
