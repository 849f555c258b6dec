"""Commands that make images and figures again; they give the places, which a configuration file may not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfm.eval.report.read import ReportedRun
from sfm.eval.report.words import command_line


def evaluate_again(run: Path, config: Mapping[str, Any]) -> str:
    """Write the command that repeats an evaluation."""
    places = {name: config.get(name) for name in ("store", "backbone", "out")}
    return command_line("evaluate", str(run), {"config": run / "evaluation.json", **places})


def distill_command(run: ReportedRun) -> str:
    """Write the command that makes the images again, from the very entry they were made from."""
    record = run.run.record
    if isinstance(run.details.config.get("classes"), list):
        # No option takes a list of classes; run.json holds it.
        dataset = f"{record.dataset}@{record.entry_digest[:12]}"
        again = {"config": run.directory / "run.json", "dataset": dataset, "out": f"{run.directory}-again"}
        return command_line(
            "distill", None, {**again, "store": record.store, "backbone": record.config.backbone}
        )
    asked = {name: value for name, value in run.details.config.items() if name not in ("resume", "out")}
    pinned = {
        "store": record.store,
        "backbone": record.config.backbone,
        "image_size": record.image_size,
        "dataset": f"{record.dataset}@{record.entry_digest[:12]}",
    }
    return command_line("distill", None, {**pinned, **asked, **pinned, "out": f"{run.directory}-again"})
