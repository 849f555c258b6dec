"""Steps of `sfm distill` on an idle machine and beside processes that want its cores.

``python benchmarks/busy.py [--quick] [--busy 2] [--json FILE]``

Each way is the command itself, started anew in every round, in turn with the others: with one thread; with a
thread per core that spins while it waits, as OpenMP does by default; with threads that sleep; and as the
command chooses.
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

SFM = str(Path(sys.executable).with_name("sfm"))
SPINNING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""What GNU's and LLVM's OpenMP do where nothing is said."""

WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one thread": (["--threads", "1"], {}),
    "spinning": ([], SPINNING),
    "sleeping": ([], {"OMP_WAIT_POLICY": "PASSIVE"}),
    "as chosen": ([], {}),
}


def extract_small(place: Path) -> None:
    """Make a store of a few real images per class."""
    words = ["extract", "builtin:fashion-mnist-6k", "--store", str(place), "--backbone", "lite0"]
    words += ["--image-size", "96", "--limit-per-class", "20", "--sub-classes", "2", "--quiet"]
    subprocess.run([SFM, *words], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def steps_in_20_seconds(way: str, place: Path, seconds: float) -> float:
    """Run a distillation for a while; return how many steps it does in 20 seconds."""
    options, environment = WAYS[way]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        out = Path(folder) / "run"
        words = ["distill", "--store", str(place / "store"), "--backbone", "lite0", "--out", str(out)]
        words += ["--dataset", "fashion-mnist-6k", "--steps", "100000", "--checkpoint-every", "100000"]
        command = [SFM, *words, *options, "--quiet"]
        with subprocess.Popen(command, env=os.environ | environment) as process:
            try:
                history = out / "history.csv"
                while not history.exists() or steps_of(history) < 10:
                    if process.poll() is not None:
                        raise SystemExit(f"{way}: the distillation has ended")
                    time.sleep(0.02)
                before, began = steps_of(history), time.perf_counter()
                time.sleep(seconds)
                done, took = steps_of(history) - before, time.perf_counter() - began
            finally:
                process.kill()
    return 20 * done / took


def steps_of(history: Path) -> int:
    """Return how many steps a history holds."""
    return history.read_bytes().count(b"\n") - 1


def main() -> None:
    """Measure all ways by turns; print medians, and ratios to one thread and to spinning."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--busy", type=int, default=2, help="processes beside it (2)")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=20.0, help="to count steps for (20)")
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments.add_argument("--quick", action="store_true", help="two rounds of three seconds: shows it runs")
    arguments.add_argument("--json", type=Path, help="write the figures here")
    given = arguments.parse_args()
    rounds, seconds = (2, 3.0) if given.quick else (given.rounds, given.seconds)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        extract_small(place / "store")
        for _ in range(rounds):
            for load in (0, given.busy):
                with busy(load):
                    for way in given.ways:
                        steps = steps_in_20_seconds(way, place, seconds)
                        name = f"beside {load} busy processes" if load else "idle"
                        found.setdefault(name, {}).setdefault(way, []).append(steps)
    table = Table(title=f"steps in 20 s, median of {rounds} rounds, {os.cpu_count()} cores")
    for column in ("machine", "threads", "steps", "of one thread", "of spinning"):
        table.add_column(column, justify="left" if column in ("machine", "threads") else "right")
    for name, ways in found.items():
        medians = {way: statistics.median(values) for way, values in ways.items()}
        for way, steps in medians.items():
            ratios = [f"{steps / medians[base]:.2f}" if medians.get(base) else "–" for base in list(WAYS)[:2]]
            table.add_row(name, way, f"{steps:.0f}", *ratios)
    Console(width=100).print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
