"""Accuracy by images per class, views, objective and gradient, on a tuning entry.

    python benchmarks/options.py [--source idx:FOLDER] [--store URL] [--work DIR] [--only ipc views ...]

ipc
    1, 5 and 10 images per class, each matched to a sub-class centre of its own; 10 that are each matched to
    the class mean; and 10 whose average is matched to it, as published.
views
    1, 3 and 10 views of each image per step, in equal time: the steps of the other runs follow from the
    measured time of a few of them.
objective
    Flows compared as a whole, and own centres and other-class centres matched apart, at several weights.
gradient
    One graph of all images, and micro-batches in one pass. (Micro-batches with the exact gradient are the
    former, to rounding.)

Runs are shorter than those of `sfm distill` by default, all of a group alike.

Held-out data is not used: all runs are scored by a linear head on the part of the training split that the
tuning entry holds out. With --work, runs that an earlier call has finished are not done again.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from schedule import distill_and_score

from sfm.api import DistillConfig, ExtractConfig, distill, extract, open_store

DISTILL_STEPS = 600
IPC_STEPS = 400
TIMED_STEPS = 30

IPC_RUNS = {
    "1": {"ipc": 1},
    "5": {"ipc": 5},
    "10": {"ipc": 10},
    "10, each matched to the mean": {"ipc": 10, "centres": "class-mean"},
    "10, average matched to the mean": {"ipc": 10, "centres": "class-average"},
}
VIEW_COUNTS = (1, 3, 10)
OBJECTIVE_RUNS = {
    "flow": {},
    "decoupled, alpha 1": {"objective": "sfm-decoupled", "alpha": 1.0},
    "decoupled, alpha 0.5": {"objective": "sfm-decoupled", "alpha": 0.5},
    "decoupled, alpha 0": {"objective": "sfm-decoupled", "alpha": 0.0},
}
GRADIENT_RUNS = {
    "whole batch": {},
    "one-pass, 5 at a time": {"micro_batch": 5, "gradient": "one-pass"},
}

GROUPS_OF_EQUAL_STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "ipc": IPC_RUNS,
    "objective": OBJECTIVE_RUNS,
    "gradient": GRADIENT_RUNS,
}
"""Groups whose runs have equally many steps."""


def measure_seconds_per_step(store: str, dataset: str, views: int) -> float:
    """Return the median seconds of a step with a number of views and all pyramid levels."""
    with tempfile.TemporaryDirectory() as folder:
        config = DistillConfig(
            store=store,
            backbone="lite0",
            dataset=dataset,
            out=Path(folder) / "run",
            views=views,
            steps=TIMED_STEPS,
            grow_every=1,
        )
        step_times: list[float] = []
        distill(config, lambda event: step_times.append(time.perf_counter()))
    return statistics.median(after - before for before, after in pairwise(step_times[10:]))


def iter_group_runs(group: str, store: str, dataset: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the runs of a group: name and options of `sfm distill`."""
    if group != "views":
        steps = IPC_STEPS if group == "ipc" else DISTILL_STEPS
        yield from (
            (name, {"steps": steps} | options) for name, options in GROUPS_OF_EQUAL_STEPS[group].items()
        )
    else:
        seconds_by_views = {views: measure_seconds_per_step(store, dataset, views) for views in VIEW_COUNTS}
        for views, seconds in seconds_by_views.items():
            yield (
                str(views),
                {"views": views, "steps": max(1, round(DISTILL_STEPS * seconds_by_views[1] / seconds))},
            )


def main() -> None:
    """Run the groups, print tables, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="builtin:fashion-mnist-6k", help="dataset, e.g. idx:FOLDER")
    parser.add_argument("--store", help="store of its statistics, or where to make it")
    parser.add_argument("--work", type=Path, help="folder for runs; what it holds is not done again")
    parser.add_argument("--only", nargs="+", choices=["ipc", "views", "objective", "gradient"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        store = arguments.store or str(work / "store")
        config = ExtractConfig(
            source=arguments.source, store=store, backbone=["lite0"], image_size=96, tune_fraction=0.2
        )
        extract(config)
        (name,) = {entry.dataset for entry in open_store(store).list_summaries() if entry.role == "tuning"}
        for group in arguments.only or ["ipc", "views", "objective", "gradient"]:
            for run_name, options in iter_group_runs(group, store, f"{name}@tuning"):
                for seed in range(arguments.seeds):
                    rows.append(measure_run(work, store, f"{name}@tuning", group, run_name, options, seed))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"benchmark": "options", "dataset": name, "rows": rows}, indent=1)
        )
    print_group_tables(rows, f"{name}@tuning")


def measure_run(
    work: Path, store: str, dataset: str, group: str, run_name: str, options: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Return the figures of a run; read them if it has finished before."""
    cache_file = work / f"{group}-{run_name.replace(' ', '-').replace(',', '')}-{seed}.json"
    if not cache_file.exists():
        cache_file.write_text(
            json.dumps(
                distill_and_score(f"{group}-{run_name}", options, store, work, seed, dataset, ["lite0"])
            )
        )
    row: dict[str, Any] = json.loads(cache_file.read_text())
    return row | {"group": group, "what": run_name, "seed": seed}


def print_group_tables(rows: list[dict[str, Any]], dataset: str) -> None:
    """Print a table per group: means and deviations over seeds."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["group"]][row["what"]].append(row)
    for group, runs in groups.items():
        table = Table(title=f"{group}: {dataset}, lite0, {len(next(iter(runs.values())))} seeds")
        for column in (group, "steps", "top-1 %", "loss", "seconds"):
            table.add_column(column, justify="left" if column == group else "right")
        for run_name, figures in runs.items():
            top1 = [100 * row["lite0"] for row in figures]
            spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
            table.add_row(
                run_name,
                str(figures[0]["steps"]),
                f"{statistics.fmean(top1):.1f}{spread}",
                f"{statistics.fmean(row['loss'] for row in figures):.3f}",
                f"{statistics.fmean(row['seconds'] for row in figures):.0f}",
            )
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
