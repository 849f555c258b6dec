"""Run commands in process, each in a fork of one warm process: bounded in memory and time, and watched.

``python worker.py`` is that process. It imports everything once, starts no thread, and takes one request per
line on stdin: a JSON object with ``argv``, ``cwd``, ``seconds`` and ``memory``. Each runs in a fork of its
own, so that none can hurt the next; the answer is one JSON line.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS, IDLE_SECONDS, SECONDS = 20, 10.0, 120.0
"""What a command on toy data may take of the processor, without using it, and in all.

A sound one takes about a second, but other processes may be at work.
"""

MAX_MEMORY_GROWTH = 256 * 2**20
"""What a command on toy data may take beyond what is imported; a sound one takes up to 90 MiB."""

MAX_DATA_BYTES = 1024 * 2**20
"""How far a fork may grow before the system refuses it more: nothing here may fill the machine."""

MAX_FILE_BYTES = 256 * 2**20

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Others reserve a gigabyte, which counts as data.
    "COLUMNS": "140",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes
    ----------
    status : int or None
        Exit status; negative is a signal, None means that time ran out.
    out, err : str
        What it printed; bytes that are not UTF-8 as surrogates.
    exception : str
        Type of what nobody caught, and where in this project it came from; empty if nothing did.
    growth : int
        Peak of the resident memory beyond what it was at the start, in bytes.
    seconds : float
    """

    status: int | None
    out: str
    err: str
    exception: str
    growth: int
    seconds: float


class Worker:
    """The warm process, started when it is first asked."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, argv: Sequence[object], cwd: Path, seconds: float = SECONDS) -> Outcome:
        """Run ``sfm ARGV`` in a folder; ``-c CODE`` runs Python code there instead."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | ENVIRONMENT | {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home)},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": [str(word) for word in argv], "cwd": str(cwd), "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)
            self._process = None


@contextlib.contextmanager
def open_worker(home: Path) -> Iterator[Worker]:
    """Yield a worker whose home, with its caches, is a folder of its own."""
    worker = Worker(home)
    try:
        yield worker
    finally:
        worker.close()


def read_status_field(name: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


MODULES = (
    *("matplotlib.figure", "PIL.Image", "pyarrow.parquet", "scipy.optimize", "sklearn.cluster", "timm"),
    *("sfm.cli", "sfm.start", "sfm.named_merge"),
    *("sfm.distill.run", "sfm.eval.evaluation", "sfm.eval.backbone_matrix"),
    *("sfm.eval.export.run_export", "sfm.eval.report.page"),
    *("sfm.pipeline.extract", "sfm.pipeline.dry_run"),
    *("sfm.stats_store.garbage_collection", "sfm.stats_store.entry_copy", "sfm.stats_store.verification"),
)
"""What the commands import when they run; none of it starts a thread."""


def format_innermost_frame(error: BaseException) -> str:
    """Return the type of an exception and the innermost function of this project that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parents[2])
    ours = [f for f in frames if f.filename.startswith(here) and "/tests/" not in f.filename]
    # The rooms are reached through links in sfm/; a frame is named by its room.
    at = f"{ours[-1].filename[len(here) + 1 :].removeprefix('sfm/')}:{ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {at}"


def run_fork(argv: list[str], cwd: str, report: int) -> None:
    """Run a command in this fork; never returns. An exception is told on the pipe `report`."""
    os.setsid()
    os.chdir(cwd)
    limit = read_status_field("VmData") + MAX_DATA_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    signal.alarm(int(SECONDS) + 60)  # If nobody is left to end it.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/clear_refs").write_text("5")
    os.write(report, f"{read_status_field('VmRSS')}\n".encode())
    from sfm.start import main

    sys.argv = ["sfm", *argv]
    status = 0
    try:
        if argv[:1] == ["-c"]:
            exec(argv[1], {})
        else:
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException as error:  # noqa: BLE001 - it is what is looked for
        traceback.print_exc()
        os.write(report, format_innermost_frame(error).encode(errors="backslashreplace"))
        status = 70
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run_watched(argv: list[str], cwd: str, seconds: float) -> dict[str, Any]:
    """Run a command in a fork and return its outcome."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            for stream, target in ((out, 1), (err, 2)):
                os.dup2(stream.fileno(), target)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            run_fork(argv, cwd, writing)
        os.close(writing)
        in_time = wait(child, seconds)
        # What the command started and left goes too: the fork leads a session of its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        _, ended, used = os.wait4(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            start, _, exception = pipe.read().decode().partition("\n")
        printed = []
        for stream in (out, err):
            stream.seek(0)
            printed.append(stream.read().decode(errors="surrogateescape"))
    in_time = in_time and ended != signal.SIGXCPU
    return {
        "status": os.waitstatus_to_exitcode(ended) if in_time else None,
        "out": printed[0],
        "err": printed[1],
        "exception": exception,
        "growth": max(0, used.ru_maxrss * 1024 - int(start or 0)),
        "seconds": time.monotonic() - began,
    }


def wait(child: int, seconds: float) -> bool:
    """Wait until a child has ended, without reaping it; return False if it hangs, or takes longer."""
    descriptor = os.pidfd_open(child)
    began = active = time.monotonic()
    used: list[bytes] = []
    try:
        while not select.select([descriptor], [], [], 0.5)[0]:
            fields = Path(f"/proc/{child}/stat").read_bytes().rpartition(b")")[2].split()
            now = time.monotonic()
            if fields[11:13] != used:  # user and system time
                active, used = now, fields[11:13]
            if now - began > seconds or now - active > IDLE_SECONDS:
                return False
    finally:
        os.close(descriptor)
    return True


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever is printed while importing is no answer.
    requests = os.fdopen(os.dup(0))
    for name in MODULES:
        importlib.import_module(name)
    for line in requests:
        print(json.dumps(run_watched(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
