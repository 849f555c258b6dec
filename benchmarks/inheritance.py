"""Classifier inheritance by start of the projector and by solver of the full-data classifier.

    python benchmarks/inheritance.py [--work DIR] [--json FILE] [--quick]

Images are distilled on the first backbone (lite0), one per class, and evaluated on the second (lite1).
Measured are all modes that use the classifier of all real images: `inherit`, `stage`, `joint`, `kd` and the
projectors in closed form, each with

classifier
    of the first backbone, by `sfm extract --classifier lbfgs` and `adam` (published);
start
    of the projector, `--projector-init zero` and `default` (published), where one is trained.

`linear` stands beside them. Every seed is a distillation of its own, evaluated once with the same seed: the
deviations include both. The images do not depend on the classifier, so each set is distilled once.

Held-out data is not used: all is scored on the part of the training split that the tuning entry holds out.
With --work, what an earlier call has finished is not done again. --quick only shows that it runs.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from measurement import log_progress, write_json
from rich.console import Console
from rich.table import Table

from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, distill, extract, open_store
from sfm.backbones.build import load_backbone
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.eval.class_subset import select_statistics_of_run_classes
from sfm.eval.config import Mode, ProjectorInit, count_views_per_image_and_seed
from sfm.eval.distilled_run import read_distilled_run
from sfm.eval.evaluated_backbones import EvaluatedBackbone
from sfm.eval.head_accuracy import compute_accuracy_by_seed
from sfm.eval.image_sets import ImageSet
from sfm.eval.mode_training import ModeTrainingContext, fit_heads_by_mode
from sfm.eval.scores import load_held_out_samples
from sfm.eval.view_features import LabelledImages, compute_view_features, draw_view_crops
from sfm.events import no_progress
from sfm.pipeline.extract_config import ClassifierSolver
from sfm.stats_store.store import Entry

SOLVERS: tuple[ClassifierSolver, ...] = ("lbfgs", "adam")


class Arm(NamedTuple):
    """A mode, and the start of its projector, where it trains one."""

    mode: Mode
    projector_init: ProjectorInit | None = None


ARMS = (
    Arm("inherit", "zero"),
    Arm("inherit", "default"),
    Arm("inherit-ridge"),
    Arm("inherit-statistics"),
    Arm("kd"),
    Arm("joint", "default"),
    Arm("stage", "zero"),
    Arm("stage", "default"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {
        "limit_per_class": None,
        "image_size": 64,
        "steps": 600,
        "epochs": 1000,
        "projector_views": None,
    },
    "quick": {"limit_per_class": 20, "image_size": 32, "steps": 20, "epochs": 20, "projector_views": 50},
}


def extract_tuning_entries(
    source: str, store_url: str, backbones: list[str], settings: dict[str, Any]
) -> dict[tuple[str, str], Entry]:
    """Return the tuning entries by backbone and solver: of the second backbone, that of lbfgs alone."""
    entries = {}
    for solver in SOLVERS:
        wanted = backbones if solver == "lbfgs" else backbones[:1]
        config = ExtractConfig(
            source=source,
            store=store_url,
            backbone=wanted,
            image_size=settings["image_size"],
            limit_per_class=settings["limit_per_class"],
            tune_fraction=0.2,
            sub_classes=(),
            classifier=solver,
        )
        log_progress(f"extract through {' and '.join(wanted)}, classifier by {solver}")
        tuning = [p.summary for p in extract(config).published if p.summary.role == "tuning"]
        for backbone, summary in zip(wanted, tuning, strict=True):
            entries[backbone, str(solver)] = open_store(store_url).open_entry(summary)
    return entries


def measure_seed(
    work: Path,
    store_url: str,
    backbones: list[str],
    entries: dict[tuple[str, str], Entry],
    settings: dict[str, Any],
    seed: int,
) -> list[dict[str, Any]]:
    """Distil one set of images, train every arm on it, and return a row for each arm and solver."""
    own, other = backbones
    summary, out = entries[own, "lbfgs"].summary, work / f"run-{seed}"
    log_progress(f"distil, seed {seed}")
    distill(
        DistillConfig(
            store=store_url,
            backbone=own,
            dataset=f"{summary.dataset}@{summary.entry_digest}",
            image_size=settings["image_size"],
            out=out,
            steps=settings["steps"],
            seed=seed,
            resume=True,
        )
    )
    run = read_distilled_run(out)
    image_set = ImageSet("distilled", LabelledImages(run.pixels, run.labels), 1)
    config = EvaluateConfig(
        run=out,
        store=store_url,
        seeds=1,
        seed=seed,
        epochs=settings["epochs"],
        projector_views=settings["projector_views"],
    )
    views = max(
        count_views_per_image_and_seed(config, mode, len(run.pixels)) for mode in ("linear", "inherit")
    )
    crops = draw_view_crops(image_set.images, views, seed)
    log_progress(f"features of {views} views of {len(run.pixels)} images, twice")
    features = {}
    for spec in backbones:
        backbone = optimize_for_cpu_inference(load_backbone(spec, image_size=settings["image_size"]))
        features[spec] = compute_view_features(backbone, image_set.images, crops)
    evaluated = EvaluatedBackbone(
        backbone, select_statistics_of_run_classes(entries[other, "lbfgs"], run.class_ids, out)
    )
    samples = load_held_out_samples(evaluated)
    rows = []
    for solver in SOLVERS:
        context = ModeTrainingContext(
            evaluated,
            select_statistics_of_run_classes(entries[own, solver], run.class_ids, out),
            image_set,
            features[other],
            features[own],
        )
        # A fresh head uses no classifier of real images: once is enough.
        for arm in (*([Arm("linear")] if solver == "lbfgs" else []), *ARMS):
            log_progress(f"{arm.mode}, start {arm.projector_init}, classifier by {solver}")
            options = config.model_copy(update={"projector_init": arm.projector_init or "zero"})
            heads = fit_heads_by_mode(arm.mode, context, options, no_progress).heads
            (top1,) = compute_accuracy_by_seed(heads, samples.features, samples.labels).top1
            rows.append(
                {
                    "mode": arm.mode,
                    "start": arm.projector_init,
                    "classifier": None if arm.mode == "linear" else solver,
                    "seed": seed,
                    "top1": top1,
                }
            )
    return rows


def format_top1_of_seeds(values: list[float]) -> str:
    """Return mean and sample deviation in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}" if values else "–"


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Print a table: a line per mode and start, a column per solver."""
    top1: dict[tuple[str, str | None], dict[str | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        top1[row["mode"], row["start"]][row["classifier"]].append(row["top1"])
    table = Table(title=title)
    for column in ("mode", "projector starts", "classifier by lbfgs", "by adam"):
        table.add_column(column, justify="left" if column in ("mode", "projector starts") else "right")
    for (mode, start), by_solver in top1.items():
        shown = [format_top1_of_seeds(by_solver[solver] or by_solver[None]) for solver in SOLVERS]
        table.add_row(mode, start or "–", *shown)
    Console(width=100).print(table)


def main() -> None:
    """Run all arms, print the table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="builtin:fashion-mnist-6k", help="dataset, e.g. idx:FOLDER")
    parser.add_argument("--backbones", nargs=2, default=["lite0", "lite1"], metavar=("ON", "FOR"))
    parser.add_argument("--seeds", type=int, default=3, help="distillations, each evaluated once")
    parser.add_argument(
        "--work", type=Path, help="folder for store and runs; what it holds is not done again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="few images, steps and epochs")
    for name in ("image-size", "steps", "epochs", "limit-per-class"):
        parser.add_argument(f"--{name}", type=int, help="another value than the default")
    arguments = parser.parse_args()
    settings = SETTINGS["quick" if arguments.quick else "full"]
    given = {name: value for name, value in vars(arguments).items() if name in settings and value is not None}
    settings = settings | given
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        store_url = str(work / "store")
        entries = extract_tuning_entries(arguments.source, store_url, arguments.backbones, settings)
        rows = []
        for seed in range(arguments.seeds):
            finished = work / f"seed-{seed}.json"
            if not finished.exists():
                found = measure_seed(work, store_url, arguments.backbones, entries, settings, seed)
                finished.write_text(json.dumps(found))
            rows += json.loads(finished.read_text())
    full_data = {
        f"{backbone}, {solver}": entry.classifier.held_out_top1
        for (backbone, solver), entry in entries.items()
    }
    own, other = arguments.backbones
    write_json(
        {
            "benchmark": "inheritance",
            "source": arguments.source,
            "distilled_on": own,
            "evaluated_on": other,
            "settings": settings,
            "full_data_top1": full_data,
            "rows": rows,
        },
        arguments.json,
    )
    print_rows(
        rows,
        f"{arguments.source}, tuning split, {settings['image_size']} px, {own} to {other}: top-1 %, "
        f"{arguments.seeds} distillations of {settings['steps']} steps",
    )
    for name, top1 in full_data.items():
        print(f"classifier of all real images, {name}: {100 * top1:.1f}" if top1 is not None else name)


if __name__ == "__main__":
    main()
