"""What the targets of the objectives allow: accuracies of heads trained on them, without any image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import train_and_score
from measurement import log_progress
from objective_comparison.arms import EVALUATED_BACKBONES, ComparedDataset, DistilledRole
from objective_comparison.centres import measure_flow_cosine, read_real_centres
from objective_comparison.entries import find_entry

from sfm.api import DistillConfig
from sfm.atomic import atomic_write
from sfm.distill.objective import OBJECTIVES, ClassCentres, read_or_compute_targets
from sfm.stats_store.store import Entry


def read_or_score_targets(
    dataset: ComparedDataset, role: DistilledRole, images_per_class: int, work: Path
) -> list[dict[str, Any]]:
    """Return the rows of :func:`score_targets`, from their file if they were measured before."""
    file = work / "target_scores" / f"{dataset.key}-{role}-{images_per_class}.json"
    if not file.exists():
        log_progress(f"{dataset.name}, {role}: targets of {images_per_class} images per class")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = score_targets(dataset, role, images_per_class)
        atomic_write(file, json.dumps(rows, indent=1).encode())
    scored: list[dict[str, Any]] = json.loads(file.read_bytes())
    return scored


def score_targets(
    dataset: ComparedDataset, role: DistilledRole, images_per_class: int
) -> list[dict[str, Any]]:
    """Return, for every backbone and target, the accuracy of heads trained on the target itself.

    Heads are trained as `sfm evaluate` trains them on images, and scored on the entry's held-out samples.
    """
    rows = []
    for backbone in EVALUATED_BACKBONES:
        entry = find_entry(dataset, role, backbone)
        real = read_real_centres(entry, 1)
        for target, centres in iter_targets(dataset, entry, images_per_class):
            mean, std = train_and_score(entry, centres.own_centres)
            rows.append(
                {
                    "dataset": dataset.name,
                    "role": role,
                    "backbone": backbone,
                    "ipc": images_per_class,
                    "target": target,
                    "top1_mean": mean / 100,
                    "top1_std": std / 100,
                    "real_cosine": measure_flow_cosine(centres, real),
                    "full_data_top1": entry.summary.held_out_top1,
                }
            )
    return rows


def iter_targets(
    dataset: ComparedDataset, entry: Entry, images_per_class: int
) -> Iterator[tuple[str, ClassCentres]]:
    """Yield the entry's own centres, and those that every objective with targets of its own computes."""
    yield (
        "real class means" if images_per_class == 1 else "real sub-class centres",
        read_real_centres(entry, images_per_class),
    )
    for name, kind in OBJECTIVES.items():
        if kind.compute_targets:
            config = DistillConfig(
                store=dataset.store,
                backbone=entry.summary.backbone,
                dataset=dataset.name,
                out=Path("unused"),
                objective=name,
                ipc=images_per_class,
            )
            (targets,) = read_or_compute_targets([entry], config, np.arange(len(entry.dataset.class_ids)))
            yield f"targets of {name}", targets
