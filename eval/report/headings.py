"""Headings that tell runs apart by what differs between them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sfm.eval.report.read import ReportedRun

TOLD = {
    "objective": "{}",
    "views": "{} views",
    "steps": "{} steps",
    "learning_rate": "rate {}",
    "seed": "seed {}",
}
"""Options that a heading names where runs differ in them, besides backbone, size and images per class."""


def subject(run: ReportedRun) -> str:
    """Say what a run is: its data, backbone, size and images per class."""
    record = run.run.record
    made = f"distilled on {record.backbone.spec} at {record.image_size} px"
    return f"{record.dataset}, {made}, {record.ipc:,} per class"


def page_title(runs: Sequence[ReportedRun]) -> str:
    """Return the heading of a page."""
    if len(runs) == 1:
        return f"{subject(runs[0])} ({runs[0].name})"
    return f"{len(runs)} distilled datasets compared"


def subjects(runs: Sequence[ReportedRun]) -> list[str]:
    """Say what each of several runs is, and in which options they differ."""
    options = [{name: option(run, name) for name in TOLD} for run in runs]
    differing = [name for name in TOLD if len({str(found[name]) for found in options}) > 1]
    return [
        ", ".join(
            [
                subject(run),
                *(TOLD[name].format(found[name]) for name in differing if found[name] is not None),
            ]
        )
        for run, found in zip(runs, options, strict=True)
    ]


def option(run: ReportedRun, name: str) -> Any:
    """Return an option of a run; None if it does not say."""
    return run.details.seed if name == "seed" else run.details.config.get(name)


def group_titles(groups: Sequence[Sequence[ReportedRun]]) -> list[str]:
    """Name groups of runs by their dataset, and by the runs where several are of that name."""
    names = [runs[0].run.record.dataset for runs in groups]
    often = Counter(names)
    return [
        name if often[name] == 1 else f"{name} ({', '.join(run.name for run in runs)})"
        for name, runs in zip(names, groups, strict=True)
    ]
