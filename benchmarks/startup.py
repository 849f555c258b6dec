"""Wall time of `sfm --help` and `sfm store ls`, against the bare interpreter.

``python benchmarks/startup.py [--store URL] [--json FILE]``
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SFM_PATH = str(Path(sys.executable).with_name("sfm"))


def time_command(command: list[str]) -> float:
    """Return the wall time of a command."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Run the commands alternately for several rounds and print median wall times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="also time `sfm store ls` on this store")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "sfm --help": [SFM_PATH, "--help"]}
    if arguments.store:
        commands["sfm store ls"] = [SFM_PATH, "store", "ls", arguments.store]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            times[name].append(time_command(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table(title="wall time, median")
    table.add_column("command")
    table.add_column("seconds", justify="right")
    table.add_column("against the bare interpreter", justify="right")
    for name, value in medians.items():
        table.add_row(name, f"{value:.3f}", f"{value / medians['python -c pass']:.1f}x")
    Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
