"""Titles and descriptions of runs, with the options in which they differ."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sfm.eval.distilled_run import ForeignRecord, format_images_per_class
from sfm.eval.report.reported_runs import ReportedRun

OPTION_FORMATS = {
    "objective": "{}",
    "views": "{} views",
    "steps": "{} steps",
    "learning_rate": "rate {}",
    "seed": "seed {}",
}
"""Options that a description names where runs differ in them."""


def describe_run(run: ReportedRun) -> str:
    """Return dataset, backbones, input sizes and images per class of a run."""
    record = run.distilled.record
    backbones = f"distilled on {record.format_backbones_with_sizes()}"
    count = format_images_per_class(run.distilled.images_per_class)
    source = ", by another program" if isinstance(record, ForeignRecord) else ""
    return f"{record.dataset}, {backbones}{source}, {count}"


def make_page_title(runs: Sequence[ReportedRun]) -> str:
    """Return the title of a page."""
    if len(runs) == 1:
        return f"{describe_run(runs[0])} ({runs[0].name})"
    return f"{len(runs)} distilled datasets compared"


def describe_runs_with_differing_options(runs: Sequence[ReportedRun]) -> list[str]:
    """Return a description of each of several runs, with the options in which they differ."""
    options = [{name: get_run_option(run, name) for name in OPTION_FORMATS} for run in runs]
    differing = [name for name in OPTION_FORMATS if len({str(values[name]) for values in options}) > 1]
    return [
        ", ".join(
            [
                describe_run(run),
                *(
                    OPTION_FORMATS[name].format(values[name])
                    for name in differing
                    if values[name] is not None
                ),
            ]
        )
        for run, values in zip(runs, options, strict=True)
    ]


def get_run_option(run: ReportedRun, option_name: str) -> Any:
    """Return an option of a run; None if ``run.json`` does not record it."""
    return run.details.seed if option_name == "seed" else run.details.config.get(option_name)


def make_dataset_group_titles(groups: Sequence[Sequence[ReportedRun]]) -> list[str]:
    """Return the dataset of every group of runs, with the names of the runs where datasets repeat."""
    names = [runs[0].distilled.record.dataset for runs in groups]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} ({', '.join(run.name for run in runs)})"
        for name, runs in zip(names, groups, strict=True)
    ]
