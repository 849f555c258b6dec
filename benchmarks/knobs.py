r"""What each choice of the published code is worth: one knob at a time against the default.

    python benchmarks/knobs.py [--work DIR] [--json FILE] [--only KNOB ...] [--seeds N] [--steps N] [--quick]
    python benchmarks/knobs.py --work DIR --entries STORE NAME [--entries STORE NAME ...]
    python benchmarks/knobs.py --dry-run

A knob is one option of `sfm distill` or of `sfm evaluate`, see `KNOBS`; all others are at their defaults. Its
settings are compared with the first one of its group, the default, by pairs of distillations of one seed.
Knobs of several images per class have runs of `MANY_IMAGES_STEPS` steps, whatever --steps is.

Runs are distilled on lite0 from the entry of role tuning, and scored on the part of the training split that
it holds out: held-out data are not read. They are scored as `sfm evaluate --mode linear` scores them, on
lite0, lite1 and lite2, of which the last two are unseen. Knobs of knowledge distillation are scored by
`--mode kd`, with the classifier of lite0.

Datasets are those of objectives.py: without --entries, Fashion-MNIST and openclipart-png are extracted first,
from two Debian packages. With --work, the same command goes on where an earlier one was stopped. --quick only
shows that all of it runs.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.result_tables import make_table
from measurement import log_progress, write_json
from objective_comparison.arms import (
    DEFAULT_STEPS,
    EVALUATED_BACKBONES,
    ArmOptions,
    ArmRun,
    ComparedDataset,
    estimate_run_seconds,
    make_arm_config,
)
from objective_comparison.entries import open_compared_dataset
from objective_comparison.scored_runs import HeadTraining, read_or_score_run, run_in_child
from objectives import NOMINAL_DATASETS, QUICK_STEPS, iter_datasets
from rich.console import Console

from sfm.api import EvaluateConfig, distill, evaluate
from sfm.atomic import atomic_write
from sfm.backbones.crop_edge import CropEdge
from sfm.errors import InputError
from sfm.eval.result import compute_mean_and_sample_std
from sfm.text import format_percent

MANY_IMAGES_STEPS = 400
"""Steps of runs of several images per class, as in options.py."""

Row = dict[str, Any]
"""One distillation, scored: ``top1`` by backbone."""


@dataclass(frozen=True)
class Knob:
    """One setting of one option.

    Attributes
    ----------
    group : str
        The option. The first knob of a group is its default.
    setting : str
    options : mapping
        Fields of DistillConfig that it sets.
    crop_edge : {"clip", "zero"}
        Of the views that it is scored with.
    kd_options : mapping or None
        Fields of EvaluateConfig, for a score by mode `kd`; None: by mode `linear`.
    """

    group: str
    setting: str
    options: ArmOptions = field(default_factory=dict)
    crop_edge: CropEdge = "clip"
    kd_options: Mapping[str, float] | None = None


ZERO_EDGE = {"crop_edge": "zero"}
KNOBS = (
    Knob("parametrization", "pyramid"),
    Knob("parametrization", "pixels", {"parametrization": "pixels"}),
    Knob("augmentation", "on"),
    Knob("augmentation", "off", {"augmentation": False}),
    Knob("color-decorrelation", "on"),
    Knob("color-decorrelation", "off", {"color_decorrelation": False}),
    Knob("start", "noise"),
    Knob("start", "zeros", {"start": "zeros"}),
    Knob("first-resolution", "1"),
    Knob("first-resolution", "16", {"first_resolution": 16}),
    Knob("first-resolution", "110, all levels", {"first_resolution": 110}),
    Knob("canvas-pixels", "110, 8/7 of the input"),
    Knob("canvas-pixels", "96, the input", {"canvas_pixels": 96}),
    Knob("canvas-pixels", "144", {"canvas_pixels": 144}),
    Knob("noisy-views", "0"),
    Knob("noisy-views", "0.5", {"noisy_views": 0.5}),
    Knob("feature-decay", "0.9"),
    Knob("feature-decay", "0", {"feature_decay": 0.0}),
    Knob("final-rate", "0.05"),
    Knob("final-rate", "1", {"final_rate": 1.0}),
    Knob("crop-edge", "clip"),
    Knob("crop-edge", "zero in distillation", ZERO_EDGE),
    Knob("crop-edge", "zero in evaluation", crop_edge="zero"),
    Knob("crop-edge", "zero in both", ZERO_EDGE, crop_edge="zero"),
    Knob("centres", "sub-class", {"ipc": 10}),
    Knob("centres", "class-mean", {"ipc": 10, "centres": "class-mean"}),
    Knob("centres", "class-average", {"ipc": 10, "centres": "class-average"}),
    Knob("kd-temperature", "4", kd_options={}),
    Knob("kd-temperature", "1", kd_options={"kd_temperature": 1.0}),
    Knob("kd-temperature", "16", kd_options={"kd_temperature": 16.0}),
    Knob("kd-weight", "0.5", kd_options={}),
    Knob("kd-weight", "0", kd_options={"kd_weight": 0.0}),
    Knob("kd-weight", "1", kd_options={"kd_weight": 1.0}),
)
GROUPS = tuple(dict.fromkeys(knob.group for knob in KNOBS))


def main() -> None:
    """Measure the knobs, print tables, and write the figures."""
    arguments = parse_knob_options()
    knobs = [knob for knob in KNOBS if arguments.only is None or knob.group in arguments.only]
    console = Console(width=140, highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).absolute()
        try:
            if arguments.dry_run:
                datasets = [open_compared_dataset(*each) for each in arguments.entries or ()]
                print_knob_plan(console, datasets or NOMINAL_DATASETS, knobs, arguments)
            else:
                measure_and_print(console, knobs, arguments, work)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def parse_knob_options() -> argparse.Namespace:
    """Parse the command line."""
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
        help="statistics that are there already, of objectives.py",
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="KNOB", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, default=3, help="distillations of every setting")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of runs of one image per class")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--dry-run", action="store_true", help="print the number of runs and a time")
    parser.add_argument("--quick", action="store_true", help="few images and steps, as a smoke test")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.steps < 1:
        parser.error("--seeds and --steps are at least 1")
    if arguments.quick:
        arguments.seeds, arguments.steps = 1, QUICK_STEPS
    return arguments


def make_knob_run(
    dataset: ComparedDataset, knob: Knob, seed: int, steps: int, *, is_quick: bool = False
) -> ArmRun:
    """Return the distillation of a knob; knobs of the same options have the same one."""
    has_many_images = knob.options.get("ipc", 1) > 1
    count = MANY_IMAGES_STEPS if has_many_images and not is_quick else steps
    name = "-".join(f"{option}-{value}" for option, value in sorted(knob.options.items())) or "default"
    return ArmRun(dataset, "tuning", name, ("equal steps",), {**knob.options, "steps": count}, seed)


def measure_and_print(
    console: Console, knobs: Sequence[Knob], arguments: argparse.Namespace, work: Path
) -> None:
    """Measure all knobs on all datasets; the figures are written after every one."""
    result: dict[str, Any] = {"benchmark": "knobs", "quick": arguments.quick, "rows": [], "summaries": []}
    for dataset in iter_datasets(arguments, work):
        for knob in knobs:
            for seed in range(arguments.seeds):
                run = make_knob_run(dataset, knob, seed, arguments.steps, is_quick=arguments.quick)
                result["rows"].append(read_or_measure_row(run, knob, work, is_quick=arguments.quick))
            result["summaries"] = summarize_knobs(result["rows"])
            write_json(result, arguments.json)
    if arguments.quick:
        console.print("--quick: too few images and steps for figures that count")
    print_knobs(console, result["summaries"])


def read_or_measure_row(run: ArmRun, knob: Knob, work: Path, *, is_quick: bool) -> Row:
    """Return the row of a knob's distillation, from its file if there is one."""
    seeds, epochs = (1, 50) if is_quick else (3, 1000)
    if knob.kd_options is None:
        scored = read_or_score_run(run, work, HeadTraining(seeds, epochs, knob.crop_edge))
    else:
        scored = read_or_score_kd(run, work, knob.kd_options, seeds, epochs)
    kept = ("dataset", "seed", "steps", "ipc", "seen", "top1", "loss", "seconds")
    return {"knob": knob.group, "setting": knob.setting} | {name: scored[name] for name in kept}


def read_or_score_kd(
    run: ArmRun, work: Path, kd_options: Mapping[str, float], seeds: int, epochs: int
) -> Row:
    """Return the score of a run by mode `kd`, from its file if there is one."""
    setting = "-".join(f"{name}-{value:g}" for name, value in sorted(kd_options.items())) or "default"
    file = work / "kd_scores" / f"{run.name}-{setting}-{seeds}x{epochs}.json"
    if not file.exists():
        log_progress(f"{run.dataset.name}: kd of {run.arm}, {setting}, seed {run.seed}")
        file.parent.mkdir(parents=True, exist_ok=True)
        row = run_in_child(distill_and_score_kd, run, work, dict(kd_options), seeds, epochs)
        atomic_write(file, json.dumps(row, indent=1).encode())
    scored: Row = json.loads(file.read_bytes())
    return scored


def distill_and_score_kd(
    run: ArmRun, work: Path, kd_options: Mapping[str, float], seeds: int, epochs: int
) -> Row:
    """Distil a run unless it is there, and train heads from its images and the classifier of lite0."""
    config = make_arm_config(run, work / "runs")
    record = distill(config).record
    evaluation = evaluate(
        EvaluateConfig(
            run=config.out,
            store=config.store,
            backbone=list(EVALUATED_BACKBONES),
            mode=["kd"],
            seeds=seeds,
            epochs=epochs,
            **kd_options,  # type: ignore[arg-type]
        )
    )
    wanted = make_knob_protocol(kd_options)
    return {
        "dataset": run.dataset.name,
        "seed": run.seed,
        "steps": config.steps,
        "ipc": config.ipc,
        "seen": [EVALUATED_BACKBONES[0]],
        "top1": {
            row.backbone: row.top1_mean
            for row in evaluation.rows
            if row.images == "distilled"
            and row.mode == "kd"
            and (row.kd_temperature, row.kd_weight, row.epochs, row.seeds) == (*wanted, epochs, seeds)
        },
        "loss": record["loss"],
        "seconds": record["wall_seconds"],
    }


def make_knob_protocol(kd_options: Mapping[str, float]) -> tuple[float, float]:
    """Return temperature and weight, with the defaults of `sfm evaluate` for what is not set."""
    fields = EvaluateConfig.model_fields
    return tuple(kd_options.get(name, fields[name].default) for name in ("kd_temperature", "kd_weight"))  # type: ignore[return-value]


def summarize_knobs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a summary per dataset and setting: means over distillations, and differences to the default.

    ``difference`` holds, by backbone, mean and sample standard deviation of the accuracy less that of the
    group's first setting, over pairs of distillations of the same seed; None for the first setting itself.
    """
    return [summary for group in iter_groups(rows) for summary in summarize_group(group)]


def iter_groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each dataset and knob."""
    for key in dict.fromkeys((row["dataset"], row["knob"]) for row in rows):
        yield [row for row in rows if (row["dataset"], row["knob"]) == key]


def summarize_group(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a summary per setting of a knob; the first is what the others are compared with."""
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row)
    first = {row["seed"]: row for row in rows if row["setting"] == rows[0]["setting"]}
    summaries = []
    for setting, own in by_setting.items():
        pairs = [(row, first[row["seed"]]) for row in own if row["seed"] in first]
        backbones = own[0]["top1"]
        summaries.append(
            {
                **{name: own[0][name] for name in ("dataset", "knob", "steps", "ipc", "seen")},
                "setting": setting,
                "distillations": len(own),
                "top1": {
                    name: compute_mean_and_sample_std([row["top1"][name] for row in own])
                    for name in backbones
                },
                "difference": None
                if own[0] is rows[0]
                else {
                    name: compute_mean_and_sample_std(
                        [row["top1"][name] - other["top1"][name] for row, other in pairs]
                    )
                    for name in backbones
                },
                "loss": statistics.fmean(row["loss"] for row in own),
                "seconds": statistics.fmean(row["seconds"] for row in own),
            }
        )
    return summaries


def print_knobs(console: Console, summaries: Sequence[dict[str, Any]]) -> None:
    """Print a table per dataset; differences are points to the first setting of the knob."""
    for dataset in dict.fromkeys(summary["dataset"] for summary in summaries):
        columns = (
            *("knob", "setting", "ipc", "steps"),
            *(column for name in EVALUATED_BACKBONES for column in (f"{name} %", "±")),
            *("loss", "seconds"),
        )
        own = [summary for summary in summaries if summary["dataset"] == dataset]
        title = f"{dataset}, tuning samples; ±: points to the first setting; n = {own[0]['distillations']}"
        table = make_table(title, columns, ("knob", "setting"))
        for before, each in zip([None, *own], own, strict=False):
            is_new_knob = before is None or before["knob"] != each["knob"]
            table.add_row(
                each["knob"] if is_new_knob else "",
                each["setting"],
                str(each["ipc"]),
                str(each["steps"]),
                *(text for name in EVALUATED_BACKBONES for text in format_accuracy(each, name)),
                f"{each['loss']:.3f}",
                f"{each['seconds']:.0f}",
            )
        console.print(table)


def format_accuracy(summary: dict[str, Any], backbone: str) -> tuple[str, str]:
    """Return the accuracy on a backbone, and the difference to the knob's first setting in points."""
    mean, std = summary["top1"][backbone]
    top1 = format_percent(mean, std if summary["distillations"] > 1 else None)
    if summary["difference"] is None:
        return top1, ""
    difference, spread = summary["difference"][backbone]
    text = f"{100 * difference:+.1f}"
    return top1, f"{text} ± {100 * spread:.1f}" if summary["distillations"] > 1 else text


def print_knob_plan(
    console: Console,
    datasets: Sequence[ComparedDataset],
    knobs: Sequence[Knob],
    arguments: argparse.Namespace,
) -> None:
    """Print the number of distillations, and their estimated minutes on two cores."""
    runs = {
        run.name: run
        for dataset in datasets
        for knob in knobs
        for seed in range(arguments.seeds)
        for run in [make_knob_run(dataset, knob, seed, arguments.steps, is_quick=arguments.quick)]
    }
    minutes = sum(map(estimate_run_seconds, runs.values())) / 60
    console.print(
        f"{len(knobs)} settings of {len({knob.group for knob in knobs})} knobs on {len(datasets)} datasets: "
        f"{len(runs)} distillations, about {minutes:.0f} minutes on two cores; scores by mode kd come on top"
    )


if __name__ == "__main__":
    main()
