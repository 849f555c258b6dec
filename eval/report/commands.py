"""Commands that make images and figures again; they give what a configuration file may not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfm.config_fields import select_refused_values
from sfm.eval.config import EvaluateConfig
from sfm.eval.report.read import ReportedRun
from sfm.eval.report.words import command_line

LARGE = ("ipc", "views", "micro_batch", "graphs", "devices")
"""Options of `sfm distill` that a file may not give where they take much memory."""

OPTIONS = frozenset(
    {
        *LARGE,
        "store",
        "backbone",
        "image_size",
        "dataset",
        "classes",
        "objective",
        "alpha",
        "centres",
        "steps",
    }
    | {
        "learning_rate",
        "final_rate",
        "grow_every",
        "gradient",
        "checkpoint_every",
        "seed",
        "device",
        "threads",
    }
    | {"precision", "compile"}
)
"""All options of `sfm distill` that a command to paste may hold."""


def evaluate_again(run: Path, config: Mapping[str, Any]) -> str:
    """Write the command that repeats an evaluation."""
    places = {name: config.get(name) for name in ("store", "backbone", "out")}
    large = {
        name: value
        for name, value in select_refused_values(EvaluateConfig, config).items()
        if name not in (*places, "run")
    }
    return command_line("evaluate", str(run), {"config": run / "evaluation.json", **places, **large})


def distill_command(run: ReportedRun) -> str:
    """Write the command that makes the images again, from the very entry they were made from."""
    record = run.run.record
    if isinstance(run.details.config.get("classes"), list):
        # No option takes a list of classes; run.json holds it.
        dataset = f"{record.dataset}@{record.entry_digest[:12]}"
        again = {"config": run.directory / "run.json", "dataset": dataset, "out": f"{run.directory}-again"}
        places = {"store": record.store, "backbone": record.config.backbone}
        config = run.details.config
        large = {name: config[name] for name in LARGE if config.get(name) not in (None, 1)}
        return command_line("distill", None, {**again, **places, **large})
    # What is no option of `sfm distill` may be one that no stranger should put into a command.
    asked = {name: value for name, value in run.details.config.items() if name in OPTIONS}
    pinned = {
        "store": record.store,
        "backbone": record.config.backbone,
        "image_size": record.image_size,
        "dataset": f"{record.dataset}@{record.entry_digest[:12]}",
    }
    return command_line("distill", None, {**pinned, **asked, **pinned, "out": f"{run.directory}-again"})
