r"""Objectives and schedules compared, on backbones that the images were matched to and on unseen ones.

    python benchmarks/objectives.py [--work DIR] [--json FILE] [--only ARM ...] [--seeds N] [--quick]
    python benchmarks/objectives.py --dry-run
    python benchmarks/objectives.py --work DIR --entries STORE NAME [--entries STORE NAME ...]
    python benchmarks/objectives.py --work DIR --held-out ARM [ARM ...]

An arm is a set of options of `sfm distill`, see `ARMS`. Every arm distils several times (--seeds), with

equal steps
    the number of steps of the arm, and
equal time
    as many steps as take the time in which SFM as published, with as many images per class, does the steps of
    the arm. Steps are timed first, in rounds that alternate between the arms. An arm whose steps cost as much
    as those, to 5 %, has the same runs for both.

Every run is scored as `sfm evaluate --mode linear` scores it, on lite0, lite1 and lite2. Backbones that the
images were not matched to are marked as unseen. The cosines are those of the images' flow, over 50 views of
each, to the flow that they were matched to and to that of the store's means. Each run has a process of its
own, so that its peak memory is its own.

The ceilings are accuracies of heads that are trained, by the same protocol, on the targets in the place of
the features of images: what images would reach that follow their target exactly.

Runs are distilled from the entry of role tuning, and scored on the part of the training split that it holds
out. Choices are made there. With --held-out, the arms named are then distilled from the whole training split
and scored on held-out data. --work remembers these arms, and held-out data are refused to others.

Without --entries, two Debian packages are extracted first: dataset-fashion-mnist in full, and openclipart-png
(see clipart_dataset.py). --entries names statistics that are there already: a store and the name of a dataset
that was extracted at 96 px, through lite0, lite1 and lite2, with --tune-fraction and --sub-classes 10. With
--work, the same command goes on where an earlier one was stopped, and DIR gets previews of some arms side by
side. --quick only shows that all of it runs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipart_dataset import CLIPART_FOLDER, write_clipart_dataset
from measurement import log_progress, write_json
from objective_comparison.arms import (
    ArmOptions,
    ComparedDataset,
    DistilledRole,
    iter_arm_runs,
    list_matched_backbones,
    select_arms,
)
from objective_comparison.comparison_tables import (
    TABLE_WIDTH,
    print_ceilings,
    print_comparison,
    print_plan,
    print_step_costs,
    summarize_rows,
)
from objective_comparison.entries import extract_dataset, open_compared_dataset
from objective_comparison.previews import draw_previews_side_by_side
from objective_comparison.scored_runs import HeadTraining, read_or_score_run, run_in_child
from objective_comparison.step_costs import StepCost, read_or_measure_step_costs
from objective_comparison.target_scores import read_or_score_targets
from rich.console import Console

from sfm.atomic import atomic_write
from sfm.errors import InputError

PLAIN, CORRECTED = "sfm-published", "corrected"
PUBLISHED = {"noisy_views": 0.5, "feature_decay": 0.0}
LONG = {"steps": 4000, "feature_decay": 0.95}
"""The best schedule in twice the default time, chosen on tuning entries."""

ARMS: dict[str, ArmOptions] = {
    PLAIN: {**PUBLISHED, "final_rate": 1.0},
    "sfm-published-long": {**PUBLISHED, "steps": 4000},
    "sfm": {},
    "sfm-long": LONG,
    CORRECTED: {"objective": "sfm-corrected"},
    "corrected-long": {"objective": "sfm-corrected", **LONG},
    "sfm-joint": {**LONG, "backbone": ["lite0", "lite1"]},
    "corrected-joint": {"objective": "sfm-corrected", **LONG, "backbone": ["lite0", "lite1"]},
    "sfm-published-ipc10": {"ipc": 10, **PUBLISHED, "final_rate": 1.0},
    "sfm-ipc10": {"ipc": 10},
    "corrected-ipc10": {"ipc": 10, "objective": "sfm-corrected"},
}
"""Name of every arm and the fields of DistillConfig that it sets; lite0 and defaults otherwise."""

PREVIEWED_ARMS = (PLAIN, "sfm", "sfm-long", "corrected-long")
"""Arms whose images are shown side by side."""

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
HELD_OUT_FILE = "held_out_arms.json"
QUICK_STEPS, QUICK_LIMIT = 30, 40
TIMING_SECONDS = 60.0
NOMINAL_DATASETS = (ComparedDataset("fashion-mnist", "", 10), ComparedDataset("clipart", "", 24))
"""The default datasets, for estimates before they are extracted."""


def main() -> None:
    """Compare the arms, print tables, and write the figures."""
    arguments = parse_comparison_options()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).absolute()
        try:
            if arguments.dry_run:
                print_planned_runs(arguments)
            else:
                compare_objectives(arguments, work)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def parse_comparison_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="folder for stores, runs and scores; finished ones are read"
    )
    parser.add_argument(
        "--entries",
        nargs=2,
        action="append",
        metavar=("STORE", "NAME"),
        help="statistics that are there already",
    )
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="distillations of every arm")
    parser.add_argument(
        "--held-out", nargs="+", choices=list(ARMS), metavar="ARM", help="read held-out data for these, once"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and estimated minutes")
    parser.add_argument("--quick", action="store_true", help="few images and steps, as a smoke test")
    return parser.parse_args()


def compare_objectives(arguments: argparse.Namespace, work: Path) -> None:
    """Do everything: the tuning entries first, held-out data last."""
    arms, training = choose_arms(arguments), choose_head_training(arguments)
    if arguments.held_out:
        require_no_other_held_out_arms(work, arguments.held_out)
    datasets = list(iter_datasets(arguments, work))
    budget = 0.0 if arguments.quick else TIMING_SECONDS
    costs = {dataset.key: read_or_measure_step_costs(dataset, arms, work, budget) for dataset in datasets}
    result: dict[str, Any] = {
        "benchmark": "objectives",
        "quick": arguments.quick,
        "arms": arms,
        "step_costs": {dataset.name: costs[dataset.key] for dataset in datasets},
        "rows": [],
        "ceilings": [],
    }
    add_measurements(result, "tuning", datasets, arms, costs, arguments.seeds, training, work)
    draw_previews(result["rows"], work)
    if arguments.held_out:
        remember_held_out_arms(work, arguments.held_out)
        chosen = select_arms(arms, arguments.held_out)
        add_measurements(result, "full", datasets, chosen, costs, arguments.seeds, training, work)
    result["summaries"] = summarize_rows(result["rows"])
    write_json(result, arguments.json)
    print_result(result)


def choose_arms(arguments: argparse.Namespace) -> dict[str, ArmOptions]:
    """Return the arms that the command line asks for, shortened by --quick."""
    arms = select_arms(ARMS, arguments.only)
    if arguments.quick:
        arms = {name: {**options, "steps": QUICK_STEPS} for name, options in arms.items()}
    missing = set(arguments.held_out or ()) - arms.keys()
    if missing:
        raise InputError(f"--held-out {min(missing)} is not among --only: name it there too")
    return arms


def choose_head_training(arguments: argparse.Namespace) -> HeadTraining:
    """Return how heads are trained: as `sfm evaluate` does, unless with --quick."""
    return HeadTraining(seeds=1, epochs=50) if arguments.quick else HeadTraining()


def iter_datasets(arguments: argparse.Namespace, work: Path) -> Iterator[ComparedDataset]:
    """Yield the datasets to compare on; those of --entries, or the default ones, extracted if missing."""
    if arguments.entries:
        yield from (open_compared_dataset(store, name) for store, name in arguments.entries)
        return
    store = str(work / "store")
    if arguments.quick:
        yield extract_dataset("builtin:fashion-mnist-6k", store, 0.25, QUICK_LIMIT)
        return
    log_progress("extracting Fashion-MNIST, unless it is there")
    yield run_in_child(extract_dataset, f"idx:{FASHION_MNIST_FOLDER}", store, 0.2, None)
    if not (work / "clipart").exists():
        write_clipart_dataset(CLIPART_FOLDER, work / "clipart")
    log_progress("extracting clip art, unless it is there")
    yield run_in_child(extract_dataset, f"folder:{work / 'clipart'}", store, 0.25, None)


def add_measurements(
    result: dict[str, Any],
    role: DistilledRole,
    datasets: Sequence[ComparedDataset],
    arms: Mapping[str, ArmOptions],
    costs: Mapping[str, Mapping[str, StepCost]],
    seeds: int,
    training: HeadTraining,
    work: Path,
) -> None:
    """Distil and score all runs of a role, and measure the ceilings of its entries."""
    for dataset in datasets:
        ratios = {arm: cost["ratio"] for arm, cost in costs[dataset.key].items()}
        for run in iter_arm_runs(dataset, role, arms, ratios, seeds):
            result["rows"].append(read_or_score_run(run, work, training))
        for images_per_class in dict.fromkeys(options.get("ipc", 1) for options in arms.values()):
            result["ceilings"] += read_or_score_targets(dataset, role, images_per_class, work)


def require_no_other_held_out_arms(work: Path, names: Sequence[str]) -> None:
    """Refuse to read held-out data for other arms than an earlier call did.

    Raises
    ------
    InputError
        If held-out data were read for other arms before.
    """
    file = work / HELD_OUT_FILE
    earlier: list[str] = json.loads(file.read_bytes()) if file.exists() else sorted(names)
    if earlier != sorted(names):
        raise InputError(
            f"held-out data were read before, for other arms: repeat --held-out {' '.join(earlier)}, or "
            "choose again on the tuning entries in another --work"
        )


def remember_held_out_arms(work: Path, names: Sequence[str]) -> None:
    """Write down for which arms held-out data are read."""
    atomic_write(work / HELD_OUT_FILE, json.dumps(sorted(names)).encode())


def draw_previews(rows: Sequence[dict[str, Any]], work: Path) -> None:
    """Draw the images of plain SFM and of the corrected objective side by side, one sheet per dataset."""
    first = {(row["dataset"], row["arm"]): row for row in rows if row["seed"] == 0}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        shown = [first[dataset, arm] for arm in PREVIEWED_ARMS if (dataset, arm) in first]
        if shown:
            captioned = [(f"{row['arm']}, {row['steps']:,} steps", Path(row["preview"])) for row in shown]
            draw_previews_side_by_side(captioned, work / f"previews-{dataset}.png")


def print_result(result: dict[str, Any]) -> None:
    """Print all tables."""
    console = Console(width=TABLE_WIDTH, highlight=False)
    if result["quick"]:
        console.print("--quick: too few images and steps for figures that count")
    print_step_costs(console, result["step_costs"])
    print_comparison(console, result["summaries"])
    print_ceilings(console, result["ceilings"])


def print_planned_runs(arguments: argparse.Namespace) -> None:
    """Print every run and its estimated minutes, before anything is measured."""
    arms = choose_arms(arguments)
    datasets = [open_compared_dataset(*each) for each in arguments.entries or ()] or NOMINAL_DATASETS
    ratios = {name: float(len(list_matched_backbones(options))) for name, options in arms.items()}
    runs = [
        run
        for role, names in (("tuning", None), ("full", arguments.held_out or ()))
        for dataset in datasets
        for run in iter_arm_runs(dataset, role, select_arms(arms, names), ratios, arguments.seeds)
    ]
    print_plan(Console(width=TABLE_WIDTH, highlight=False), runs)


if __name__ == "__main__":
    main()
