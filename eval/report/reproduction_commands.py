"""Commands that reproduce images and accuracies, with the options that a configuration file may not give."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfm.config_fields import select_values_refused_from_file
from sfm.eval.config import EvaluateConfig
from sfm.eval.report.reported_runs import ReportedRun
from sfm.eval.report.text_format import format_sfm_command

LARGE_OPTIONS = ("ipc", "views", "micro_batch", "graphs", "devices", "canvas_pixels")
"""Options of `sfm distill` that a file may not give above some size."""

LABEL_OPTIONS = ("soft_labels", "label_views", "label_temperature")
"""Options of `sfm distill` for soft labels; without the first, the others have no effect."""

SWITCHES_ON_BY_DEFAULT = ("augmentation", "color_decorrelation")
"""Options of `sfm distill` that ``--no-…`` turns off."""

DISTILL_OPTIONS = frozenset(
    {
        *LARGE_OPTIONS,
        *LABEL_OPTIONS,
        *SWITCHES_ON_BY_DEFAULT,
        *("store", "backbone", "image_size", "dataset", "classes", "objective", "alpha", "centres"),
        *("steps", "learning_rate", "final_rate", "grow_every", "gradient", "checkpoint_every", "seed"),
        *("device", "threads", "precision", "execution", "compile", "backbone_weight", "feature_decay"),
        *("parametrization", "first_resolution", "start", "crop_edge", "noisy_views"),
    }
)
"""Options of `sfm distill` that a reproduction command may hold."""


def make_evaluate_command(run_directory: Path, recorded_config: Mapping[str, Any]) -> str:
    """Return the command that repeats an evaluation."""
    places = {name: recorded_config.get(name) for name in ("store", "backbone", "out")}
    large = {
        name: value
        for name, value in select_values_refused_from_file(EvaluateConfig, recorded_config).items()
        if name not in (*places, "run")
    }
    return format_sfm_command(
        "evaluate", str(run_directory), {"config": run_directory / "evaluation.json", **places, **large}
    )


def make_distill_command(run: ReportedRun) -> str:
    """Return the command that makes the images again, from the same entry."""
    record = run.distilled.record
    versioned = {
        name: value
        for name, value in run.details.resolved.model_dump().items()
        if run.details.config.get(name) is None
    }
    # The digest pins the entry of the first backbone; those of the others are of the same data.
    dataset = f"{record.dataset}@{record.entry_digest[:12]}"
    if isinstance(run.details.config.get("classes"), list):
        # No option takes a list of classes; run.json holds it.
        repeated = {"config": run.directory / "run.json", "dataset": dataset, "out": f"{run.directory}-again"}
        places = {"store": record.store, "backbone": [b.spec for b in record.backbones]}
        config = run.details.config
        large = {name: config[name] for name in LARGE_OPTIONS if config.get(name) not in (None, 1)}
        return format_sfm_command("distill", None, {**repeated, **places, **large, **versioned})
    # run.json is untrusted: its other fields must not become options of a command.
    unused = {*SWITCHES_ON_BY_DEFAULT}
    if run.details.config.get("soft_labels") is not True:
        unused.update(LABEL_OPTIONS)
    options = {
        name: value
        for name, value in run.details.config.items()
        if name in DISTILL_OPTIONS and name not in unused
    }
    options |= {
        f"no_{name}": True for name in SWITCHES_ON_BY_DEFAULT if run.details.config.get(name) is False
    }
    pinned = {
        "store": record.store,
        "backbone": [b.spec for b in record.backbones],
        "image_size": [b.image_size for b in record.backbones],
        "dataset": dataset,
    }
    return format_sfm_command(
        "distill",
        None,
        {**pinned, **options, **versioned, **pinned, "out": f"{run.directory}-again"},
    )
