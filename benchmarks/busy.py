"""Speed of `sfm distill` on an idle machine and beside busy processes, by thread settings.

``python benchmarks/busy.py [--quick] [--busy 2] [--json FILE]``

Each setting starts the command anew in every round: with one thread; with a thread per core that spins while
it waits, as OpenMP does by default; with threads that sleep; and with the command's own choice.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

SFM_COMMAND = str(Path(sys.executable).with_name("sfm"))
SPINNING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""Defaults of GNU's and LLVM's OpenMP."""

THREAD_SETTINGS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one thread": (["--threads", "1"], {}),
    "spinning": ([], SPINNING),
    "sleeping": ([], {"OMP_WAIT_POLICY": "PASSIVE"}),
    "as chosen": ([], {}),
}


def extract_small_store(store: Path) -> None:
    """Extract a few real images per class into a new store."""
    options = ["extract", "builtin:fashion-mnist-6k", "--store", str(store), "--backbone", "lite0"]
    options += ["--image-size", "96", "--limit-per-class", "20", "--sub-classes", "2", "--quiet"]
    subprocess.run([SFM_COMMAND, *options], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run a number of processes that each keep a core busy."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measure_steps_in_20_seconds(setting: str, folder: Path, seconds: float) -> float:
    """Return how many steps a distillation does in 20 seconds, from a count over `seconds`."""
    thread_options, environment = THREAD_SETTINGS[setting]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "run"
        options = ["--store", str(folder / "store"), "--backbone", "lite0", "--out", str(out)]
        options += ["--dataset", "fashion-mnist-6k", "--steps", "100000", "--checkpoint-every", "100000"]
        command = [SFM_COMMAND, "distill", *options, *thread_options, "--quiet"]
        with subprocess.Popen(command, env=os.environ | environment) as process:
            try:
                history = out / "history.csv"
                while not history.exists() or count_history_rows(history) < 10:
                    if process.poll() is not None:
                        raise SystemExit(f"{setting}: the distillation has ended")
                    time.sleep(0.02)
                before, start = count_history_rows(history), time.perf_counter()
                time.sleep(seconds)
                steps, elapsed = count_history_rows(history) - before, time.perf_counter() - start
            finally:
                process.kill()
    return 20 * steps / elapsed


def count_history_rows(history: Path) -> int:
    """Return the number of steps in a history.csv."""
    return history.read_bytes().count(b"\n") - 1


def main() -> None:
    """Measure all settings in rounds; print medians, and ratios to one thread and to spinning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--busy", type=int, default=2, help="processes beside it (2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="to count steps for (20)")
    parser.add_argument("--ways", nargs="+", choices=THREAD_SETTINGS, default=list(THREAD_SETTINGS))
    parser.add_argument("--quick", action="store_true", help="two rounds of three seconds, as a smoke test")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rounds, seconds = (2, 3.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folder_path = Path(folder)
        extract_small_store(folder_path / "store")
        for _ in range(rounds):
            for load in (0, arguments.busy):
                with busy_processes(load):
                    for setting in arguments.ways:
                        steps = measure_steps_in_20_seconds(setting, folder_path, seconds)
                        name = f"beside {load} busy processes" if load else "idle"
                        results.setdefault(name, {}).setdefault(setting, []).append(steps)
    table = Table(title=f"steps in 20 s, median of {rounds} rounds, {os.cpu_count()} cores")
    for column in ("machine", "threads", "steps", "of one thread", "of spinning"):
        table.add_column(column, justify="left" if column in ("machine", "threads") else "right")
    for name, ways in results.items():
        medians = {setting: statistics.median(values) for setting, values in ways.items()}
        for setting, steps in medians.items():
            ratios = [
                f"{steps / medians[base]:.2f}" if medians.get(base) else "–"
                for base in list(THREAD_SETTINGS)[:2]
            ]
            table.add_row(name, setting, f"{steps:.0f}", *ratios)
    Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
