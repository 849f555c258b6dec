"""Accuracy against training time of LGM and of `sfm distill`.

The images of every snapshot are scored as they would be published: by `sfm evaluate`, on held-out features.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.snapshots import (
    TUNING_FRACTION,
    AccuracyConfig,
    AccuracyContext,
    Role,
    decode_training_images,
    run_lgm,
    run_sfm,
)
from measurement import log_progress

from sfm.api import EvaluateRunsConfig, ExtractConfig, evaluate_runs, extract, open_store
from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.preparation import optimize_backbone
from sfm.distill.pyramid import compute_canvas_size
from sfm.eval.result import compute_mean_and_sample_std
from sfm.stats_store.store import Entry


def evaluate_snapshots(context: AccuracyContext, runs: Sequence[Path]) -> None:
    """Train and test a linear head on the images of every snapshot that has no accuracies yet."""
    pending = [run for run in runs if not (run / "evaluation.json").exists()]
    if pending:
        log_progress(f"scoring {len(pending)} sets of images")
        evaluate_runs(
            EvaluateRunsConfig(
                run=pending,
                store=context.store,
                mode=["linear"],
                device=context.backbone.device.type,  # type: ignore[arg-type]
                **context.evaluation_options,  # type: ignore[arg-type]
            )
        )


def read_accuracy_curve(runs: Sequence[Path]) -> list[dict[str, float]]:
    """Return step, seconds and accuracy of every scored snapshot."""
    points = []
    for run in runs:
        record = json.loads((run / "run.json").read_bytes())
        rows = json.loads((run / "evaluation.json").read_bytes())["rows"]
        (top1,) = (row["top1_mean"] for row in rows if row["images"] == "distilled")
        points.append({"step": record["step"], "seconds": record["wall_seconds"], "top1": top1})
    return points


def average_curves(curves: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Average curves over seeds, snapshot by snapshot."""
    return [
        {key: statistics.fmean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def find_time_to_accuracy(points: Sequence[dict[str, float]], top1: float) -> float | None:
    """Return the seconds to the first snapshot with at least this accuracy; None if there is none."""
    # Means over seeds have rounding errors: the last snapshot must reach its own accuracy.
    return next((point["seconds"] for point in points if point["top1"] >= top1 - 1e-9), None)


def score_lgm_rates(
    context: AccuracyContext, config: AccuracyConfig, extract_config: ExtractConfig
) -> list[dict[str, float]]:
    """Return the accuracy on the tuning split of every learning rate of LGM."""
    real = decode_training_images(
        extract_config, context.backbone, compute_canvas_size(config.image_size), "tuning"
    )
    rows = []
    for rate in config.rates:
        runs = run_lgm(context, config, real, "tuning", rate, 0)[-1:]
        evaluate_snapshots(context, runs)
        rows.append({"rate": rate, "top1": read_accuracy_curve(runs)[0]["top1"]})
        log_progress(f"LGM at {rate:g}: {100 * rows[-1]['top1']:.1f} % of the tuning split")
    return rows


def compare_accuracy(config: AccuracyConfig) -> dict[str, Any]:
    """Run LGM and SFM and return their accuracies over time, at the end, and the time to LGM's final one."""
    extract_config = ExtractConfig(
        source=config.source,
        store=config.store or str(config.work / "store"),
        backbone=[config.spec],
        image_size=config.image_size,
        limit_per_class=40 if config.quick else None,
        tune_fraction=TUNING_FRACTION,
        device=config.device,
    )
    log_progress(f"extracting {extract_config.source} into {extract_config.store}")
    extract(extract_config)
    backbone = load_backbone(config.spec, image_size=config.image_size, device=config.device)
    context = AccuracyContext(
        backbone=backbone,
        frozen_backbone=optimize_backbone(backbone, 1, "input-grad")[0],
        spec=config.spec,
        store=extract_config.store,
        entries={role: open_published_entry(extract_config, backbone, role) for role in ("full", "tuning")},
        work=config.work,
        evaluation_options={"seeds": 3, "epochs": 100, "views": 5} if config.quick else {"seeds": 3},
    )
    tuning = score_lgm_rates(context, config, extract_config)
    rate = max(tuning, key=lambda row: row["top1"])["rate"]
    real = decode_training_images(extract_config, backbone, compute_canvas_size(config.image_size), "full")
    runs: dict[str, list[list[Path]]] = {"lgm": [], "ours": []}
    for seed in range(config.seeds):
        runs["lgm"].append(run_lgm(context, config, real, "full", rate, seed))
        runs["ours"].append(run_sfm(context, config, seed))
    evaluate_snapshots(context, [run for each in (*runs["lgm"], *runs["ours"]) for run in each])
    curves = {method: [read_accuracy_curve(each) for each in own] for method, own in runs.items()}
    final = {method: [points[-1]["top1"] for points in own] for method, own in curves.items()}
    target = statistics.fmean(final["lgm"])
    mean = {method: average_curves(own) for method, own in curves.items()}
    return {
        "source": config.source,
        "backbone": config.spec,
        "image_size": config.image_size,
        "real_images": len(real.labels),
        "seeds": config.seeds,
        "tuning": tuning,
        "rate": rate,
        "curves": curves,
        "mean_curve": mean,
        "top1": {method: compute_mean_and_sample_std(each) for method, each in final.items()},
        "seconds_to_target": {
            method: find_time_to_accuracy(points, target) for method, points in mean.items()
        },
        "seconds_in_all": {method: points[-1]["seconds"] for method, points in mean.items()},
    }


def open_published_entry(config: ExtractConfig, backbone: Backbone, role: Role) -> Entry:
    """Open the entry of a role that an extraction published for a backbone."""
    store = open_store(config.store)
    (summary,) = (
        each
        for each in store.list_summaries()
        if (each.role, each.backbone_hash) == (role, backbone.card.hash)
    )
    return store.open_entry(summary)
