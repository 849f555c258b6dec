"""Tables of the comparison of objectives: means and deviations over distillations."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comparison.result_tables import make_table
from objective_comparison.arms import EVALUATED_BACKBONES, ArmRun, estimate_run_seconds
from objective_comparison.step_costs import StepCost
from rich.console import Console

from sfm.eval.result import compute_mean_and_sample_std
from sfm.text import format_percent

TABLE_WIDTH = 165


def summarize_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a summary per dataset, role, arm and number of steps: means over its distillations.

    Accuracies and cosines are mean and sample standard deviation by backbone, ``seen`` are the backbones that
    the images were matched to; every other one is unseen.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["dataset"], row["role"], row["arm"], row["steps"]].append(row)
    return [
        {
            **dict(zip(("dataset", "role", "arm", "steps"), key, strict=True)),
            "distillations": len(group),
            **{name: group[0][name] for name in ("budgets", "ipc", "seen")},
            **{name: summarize_by_backbone(group, name) for name in ("top1", "real_cosine", "target_cosine")},
            "loss": statistics.fmean(row["loss"] for row in group),
            "seconds": statistics.fmean(row["seconds"] for row in group),
            "seconds_per_step": statistics.fmean(row["seconds_per_step"] for row in group),
            "peak_bytes": max(row["peak_bytes"] for row in group),
        }
        for key, group in groups.items()
    ]


def summarize_by_backbone(group: Sequence[dict[str, Any]], figure: str) -> dict[str, tuple[float, float]]:
    """Return mean and sample standard deviation of a figure that rows hold by backbone."""
    return {
        name: compute_mean_and_sample_std([row[figure][name] for row in group]) for name in group[0][figure]
    }


def format_top1(summary: dict[str, Any], backbone: str) -> str:
    """Return the accuracy on a backbone; that on an unseen one is marked."""
    mark = "" if backbone in summary["seen"] else " unseen"
    mean, std = summary["top1"][backbone]
    return format_percent(mean, std if summary["distillations"] > 1 else None) + mark


def format_cosines(summary: dict[str, Any], figure: str) -> str:
    """Return the mean cosine on every backbone that the images were matched to."""
    return " / ".join(f"{summary[figure][name][0]:.2f}" for name in summary["seen"])


def print_comparison(console: Console, summaries: Iterable[dict[str, Any]]) -> None:
    """Print a table per dataset and role."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for summary in summaries:
        groups[summary["dataset"], summary["role"]].append(summary)
    for (dataset, role), group in groups.items():
        scored_on = "held-out data, read once" if role == "full" else "tuning samples"
        columns = (
            "arm",
            "ipc",
            "matched to",
            "equal",
            "steps",
            *(f"{name} %" for name in EVALUATED_BACKBONES),
            "loss",
            "cos target",
            "cos real",
            "ms/step",
            "seconds",
            "peak MiB",
        )
        title = f"{dataset}, scored on {scored_on}; distillations: {group[0]['distillations']}"
        table = make_table(title, columns, ("arm", "matched to", "equal"))
        for each in group:
            table.add_row(
                each["arm"],
                str(each["ipc"]),
                " ".join(each["seen"]),
                ", ".join(budget.removeprefix("equal ") for budget in each["budgets"]),
                str(each["steps"]),
                *(format_top1(each, name) for name in EVALUATED_BACKBONES),
                f"{each['loss']:.3f}",
                *(format_cosines(each, name) for name in ("target_cosine", "real_cosine")),
                f"{1e3 * each['seconds_per_step']:.0f}",
                f"{each['seconds']:.0f}",
                f"{each['peak_bytes'] / 2**20:.0f}",
            )
        console.print(table)


def print_ceilings(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the accuracy of heads on every target, and that of all data beside it."""
    columns = (
        "dataset",
        "entry",
        "backbone",
        "per class",
        "target",
        "cosine to real flow",
        "top-1 %",
        "all %",
    )
    table = make_table("Ceilings: heads trained on the targets themselves", columns, (*columns[:3], "target"))
    for row in rows:
        table.add_row(
            row["dataset"],
            row["role"],
            row["backbone"],
            str(row["ipc"]),
            row["target"],
            f"{row['real_cosine']:.3f}",
            format_percent(row["top1_mean"], row["top1_std"]),
            format_percent(row["full_data_top1"]),
        )
    console.print(table)


def print_step_costs(console: Console, costs_by_dataset: Mapping[str, Mapping[str, StepCost]]) -> None:
    """Print seconds per step, and their ratio to plain SFM with as many images, by arm."""
    columns = ("dataset", "arm", "ms per step", "of plain SFM")
    table = make_table("Cost of a step with all levels of the pyramid", columns, columns[:2])
    for dataset, costs in costs_by_dataset.items():
        for arm, cost in costs.items():
            table.add_row(dataset, arm, f"{1e3 * cost['seconds']:.1f}", f"{cost['ratio']:.2f}")
    console.print(table)


def print_plan(console: Console, runs: Sequence[ArmRun]) -> None:
    """Print the runs of every arm and their estimated minutes."""
    groups: dict[tuple[str, ...], list[ArmRun]] = defaultdict(list)
    for run in runs:
        groups[run.dataset.name, run.role, run.arm, " and ".join(run.budgets)].append(run)
    columns = ("dataset", "entry", "arm", "budget", "steps", "runs", "minutes")
    table = make_table("Planned runs, minutes on two cores", columns, columns[:4])
    for key, group in groups.items():
        minutes = sum(map(estimate_run_seconds, group)) / 60
        table.add_row(*key, str(group[0].options["steps"]), str(len(group)), f"{minutes:.0f}")
    console.print(table)
    console.print(f"{len(runs)} runs, about {sum(map(estimate_run_seconds, runs)) / 60:.0f} minutes in all")
