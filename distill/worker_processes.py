"""Run a function in several processes of this machine, which are started, monitored and ended together."""

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

from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.distill.process_group import DistributedEnv, LostProcessError
from sfm.distill.stop_signals import DistillInterrupt, catch_stop_signals
from sfm.errors import DamageError, InputError
from sfm.events import Progress, ProgressCallback, no_progress

Rank0Result = TypeVar("Rank0Result")

WorkerFunction = Callable[[DistributedEnv, ProgressCallback], Rank0Result]

POLL_SECONDS = 0.2
"""Interval at which a request to stop is passed on to the processes."""


def spawn_workers(
    function: WorkerFunction[Rank0Result], process_count: int, progress: ProgressCallback
) -> Rank0Result:
    """Run a function in several new processes, which share the threads of this one.

    They have sessions of their own, so that Ctrl-C reaches this process only: it asks the first to stop, and
    the processes agree among themselves on when. When one ends before its work is done, or this one does, all
    are ended.

    Parameters
    ----------
    function : callable
        Called with the distributed environment and a progress callback in each process; the result or
        error of the first one is returned or raised. Must be picklable.
    process_count : int
        Number of processes.
    progress : ProgressCallback
        Called with the progress of the first process.

    Raises
    ------
    InputError
        If a process ends before its work is done; else what the function raises.
    """
    threads = max(1, torch.get_num_threads() // process_count)
    processes: dict[Connection, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder, catch_stop_signals() as stop_requested:
        init_method = (Path(folder) / "meeting").as_uri()
        try:
            for rank in range(process_count):
                connection, process = _start_worker_awaiting_function()
                processes[connection] = process
                connection.send((function, DistributedEnv(rank, process_count, rank, init_method), threads))
            result: Rank0Result = _wait_for_all_and_get_rank0_result(processes, progress, stop_requested)
            return result
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def _start_worker_awaiting_function() -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start a process that waits for its function, with the module search path of this one."""
    parent_end, child_end = Pipe()
    path = os.pathsep.join(folder or "." for folder in sys.path)
    with child_end:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sfm.distill.worker_processes", str(child_end.fileno())],
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[child_end.fileno()],
            start_new_session=True,
        )
    return parent_end, process


def _wait_for_all_and_get_rank0_result(
    processes: dict[Connection, "subprocess.Popen[bytes]"],
    progress: ProgressCallback,
    stop_requested: Callable[[], bool],
) -> Any:
    """Pass on progress and a request to stop until all processes have sent their results."""
    connections = list(processes)
    results: dict[Connection, Any] = {}
    stop_sent = False
    while len(results) < len(connections):
        if stop_requested() and not stop_sent:
            processes[connections[0]].terminate()
            stop_sent = True
        pending = [connection for connection in connections if connection not in results]
        for connection in wait(pending, POLL_SECONDS):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                code = processes[connection].wait()
                if stop_sent and code == -signal.SIGTERM:
                    raise KeyboardInterrupt from None
                end = (
                    f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                )
                raise InputError(
                    f"process {connections.index(connection)} of {len(connections)} {end}, and the others "
                    "cannot continue without it: repeat the command with --resume"
                ) from None
            if isinstance(message, Progress):
                progress(message)
            elif isinstance(message, Exception) and not isinstance(
                message, LostProcessError | DistillInterrupt
            ):
                raise message
            else:
                # A process that only lost another one waits here for the error of that one.
                results[connection] = message
    result = results[connections[0]]
    if isinstance(result, Exception):
        raise result
    return result


def run_received_function(connection: Connection) -> None:
    """Run the function received from a connection, and send back its result or error."""
    configure_malloc_to_keep_memory()
    function, env, threads = connection.recv()
    threading.Thread(target=_kill_self_when_parent_ends, args=(connection,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        result = function(env, connection.send if env.rank == 0 else no_progress)
    except (InputError, DamageError, DistillInterrupt, OSError) as error:
        result = error
    connection.send(result)


def _kill_self_when_parent_ends(connection: Connection) -> None:
    """Kill this process when its parent has ended."""
    wait([connection])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_received_function(Connection(int(sys.argv[1])))
