"""Distil and score the runs of a comparison; finished ones are read from their files."""

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import safetensors.numpy
from evaluation import train_by_evaluate
from measurement import log_progress
from objective_comparison.arms import (
    EVALUATED_BACKBONES,
    IMAGE_SIZE,
    ArmRun,
    list_matched_backbones,
    make_arm_config,
)
from objective_comparison.centres import measure_flow_cosine, read_real_centres
from objective_comparison.entries import find_entry, read_held_out_tensors

from sfm.api import DistillConfig, Entry, EvaluateConfig, distill
from sfm.atomic import atomic_write
from sfm.backbones.build import load_backbone
from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.distill.objective import (
    ClassCentres,
    count_target_centres_per_class,
    read_target_centres,
)
from sfm.distill.target_file import TARGET_FILE
from sfm.eval.distilled_run import read_distilled_run
from sfm.eval.head_accuracy import compute_accuracy_by_seed
from sfm.eval.result import compute_mean_and_sample_std
from sfm.eval.view_features import LabelledImages, compute_view_features, draw_view_crops

FOLLOWED_VIEWS = 50
"""Views of an image whose mean feature is compared with the target."""


@dataclass(frozen=True)
class BackboneScore:
    """What images are worth on a backbone.

    Attributes
    ----------
    top1 : float
        Mean over heads.
    real_cosine : float
        Of the flow of the classes' images, over `FOLLOWED_VIEWS` views of each, to that of the real means.
    target_cosine : float or None
        The same, to the flow that the images were matched to.
    """

    top1: float
    real_cosine: float
    target_cosine: float | None


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class HeadTraining:
    """How linear heads are trained on images: options of `sfm evaluate`."""

    seeds: int = 3
    epochs: int = 1000
    crop_edge: CropEdge = "clip"

    @property
    def key(self) -> str:
        """Text that names files of scores."""
        return f"{self.seeds}x{self.epochs}" + ("" if self.crop_edge == "clip" else f"-{self.crop_edge}")


def run_in_child(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Return what a function returns in a process of its own, whose peak memory is that of this call."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def read_or_score_run(run: ArmRun, work: Path, training: HeadTraining) -> dict[str, Any]:
    """Return the row of a run, from its file if it has been scored by such heads before."""
    file = work / "scores" / f"{run.name}-{training.key}.json"
    if not file.exists():
        log_progress(
            f"{run.dataset.name}, {run.role}: {run.arm}, {run.options['steps']} steps, seed {run.seed}"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        row = run_in_child(distill_and_score_arm, run, work / "runs", training)
        atomic_write(file, json.dumps(row, indent=1).encode())
    scored: dict[str, Any] = json.loads(file.read_bytes())
    return scored | {"budgets": list(run.budgets)}


def distill_and_score_arm(run: ArmRun, runs_folder: Path, training: HeadTraining) -> dict[str, Any]:
    """Distil a run, train heads on its images, and measure how far their flow follows the real one."""
    config = make_arm_config(run, runs_folder)
    record = distill(config).record
    distilled = read_distilled_run(config.out)
    images = LabelledImages(distilled.pixels, distilled.labels)
    evaluate_config = EvaluateConfig(
        run=config.out,
        store=config.store,
        seeds=training.seeds,
        epochs=training.epochs,
        crop_edge=training.crop_edge,
    )
    targets = read_targets_by_backbone(run, config)
    scores = {
        spec: score_on_backbone(
            find_entry(run.dataset, run.role, spec), images, config.ipc, targets.get(spec), evaluate_config
        )
        for spec in EVALUATED_BACKBONES
    }
    return {
        "dataset": run.dataset.name,
        "role": run.role,
        "arm": run.arm,
        "seed": run.seed,
        "steps": config.steps,
        "ipc": config.ipc,
        "seen": list_matched_backbones(run.options),
        "options": dict(run.options),
        "top1": {spec: score.top1 for spec, score in scores.items()},
        "real_cosine": {spec: score.real_cosine for spec, score in scores.items()},
        "target_cosine": {spec: scores[spec].target_cosine for spec in targets},
        "loss": record["loss"],
        "seconds": record["wall_seconds"],
        "seconds_per_step": record["wall_seconds"] / config.steps,
        "peak_bytes": record["peak_memory_bytes"],
        "preview": str(config.out / "preview.png"),
    }


def read_targets_by_backbone(run: ArmRun, config: DistillConfig) -> dict[str, ClassCentres]:
    """Return what a run matched its images to: the targets that it computed, or the entries' centres."""
    file = config.out / TARGET_FILE
    computed = safetensors.numpy.load_file(file) if file.exists() else {}
    targets = {}
    for index, spec in enumerate(config.backbone):
        if computed:
            targets[spec] = ClassCentres(
                class_means=computed[f"{index}/class_means"], own_centres=computed[f"{index}/own_centres"]
            )
        else:
            entry = find_entry(run.dataset, run.role, spec)
            count = count_target_centres_per_class(config.ipc, index, config.centres)
            indices = np.arange(len(entry.dataset.class_ids))
            targets[spec] = read_target_centres(entry, count, indices, config.centres == "sub-class")
    return targets


def score_on_backbone(
    entry: Entry,
    images: LabelledImages,
    images_per_class: int,
    target: ClassCentres | None,
    config: EvaluateConfig,
) -> BackboneScore:
    """Return the top-1 accuracy of `sfm evaluate` in the mode linear, and how far images follow the target.

    Parameters
    ----------
    target : ClassCentres or None
        None for a backbone that the images were not matched to.
    """
    loaded = load_backbone(entry.summary.backbone, image_size=IMAGE_SIZE, device="auto")
    backbone = optimize_for_cpu_inference(loaded)
    heads, _ = train_by_evaluate(backbone, images, config)
    accuracy = compute_accuracy_by_seed(heads, *read_held_out_tensors(entry, backbone.device))
    crops = draw_view_crops(images, FOLLOWED_VIEWS, 0)
    features = compute_view_features(backbone, images, crops).cpu().double()
    own_centres = features.mean(dim=1).view(-1, images_per_class, features.shape[-1])
    reached = ClassCentres(class_means=own_centres.mean(dim=1).numpy(), own_centres=own_centres.numpy())
    return BackboneScore(
        top1=compute_mean_and_sample_std(accuracy.top1)[0],
        real_cosine=measure_flow_cosine(reached, read_real_centres(entry, 1)),
        target_cosine=None if target is None else measure_flow_cosine(reached, target),
    )
