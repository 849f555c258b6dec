"""Ceilings: accuracies of heads trained on features that are set by hand, without any image."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from objective_comparison.arms import EVALUATED_BACKBONES, ComparedDataset, DistilledRole
from objective_comparison.centres import compute_flow_cosine, read_real_centres
from objective_comparison.entries import find_entry, read_held_out_tensors
from objective_comparison.scored_runs import HeadTraining
from torch import Tensor

from sfm.distill.objective import OBJECTIVES, ClassCentres
from sfm.eval.head_accuracy import LinearHeads, compute_accuracy_by_seed
from sfm.eval.linear_probe import INITIAL_STD, train_linear_heads
from sfm.eval.result import compute_mean_and_sample_std
from sfm.eval.training import RandomStreamPurpose, draw_initial_weights_by_seed, make_batch_schedule
from sfm.stats_store.store import Entry


def measure_ceilings(
    dataset: ComparedDataset, role: DistilledRole, images_per_class: int, training: HeadTraining
) -> list[dict[str, Any]]:
    """Return, for every backbone and target, the accuracy of heads trained on the target itself.

    Heads are trained as `sfm evaluate` trains them on images, and scored on the entry's held-out samples.
    """
    rows = []
    for backbone in EVALUATED_BACKBONES:
        entry = find_entry(dataset, role, backbone)
        samples, labels = read_held_out_tensors(entry, torch.device("cpu"))
        real = read_real_centres(entry, 1)
        for target, centres in iter_targets(entry, images_per_class):
            heads = train_heads_on_centres(torch.from_numpy(centres.own_centres), training)
            mean, std = compute_mean_and_sample_std(compute_accuracy_by_seed(heads, samples, labels).top1)
            rows.append(
                {
                    "dataset": dataset.name,
                    "role": role,
                    "backbone": backbone,
                    "ipc": images_per_class,
                    "target": target,
                    "top1_mean": mean,
                    "top1_std": std,
                    "real_cosine": compute_flow_cosine(centres, real),
                    "full_data_top1": entry.summary.held_out_top1,
                }
            )
    return rows


def train_heads_on_centres(centres: Tensor, training: HeadTraining) -> LinearHeads:
    """Train linear heads by the protocol of evaluation, on one feature per image that is set by hand.

    Parameters
    ----------
    centres : Tensor, shape (C, K, D)
    """
    classes, images_per_class, width = centres.shape
    images = classes * images_per_class
    schedule = make_batch_schedule(
        0,
        np.tile(np.arange(images), (training.seeds, 1)),
        epoch_count=training.epochs,
        views_per_image=1,
    )
    shape = (training.seeds, classes, width)
    weights = draw_initial_weights_by_seed(0, RandomStreamPurpose.HEAD, shape, INITIAL_STD)
    labels = torch.arange(classes).repeat_interleave(images_per_class)
    return train_linear_heads(centres.reshape(images, 1, width).float(), labels, schedule, weights)


def iter_targets(entry: Entry, images_per_class: int) -> Iterator[tuple[str, ClassCentres]]:
    """Yield the entry's own centres, and those that every objective with targets of its own computes."""
    real = read_real_centres(entry, images_per_class)
    yield "real class means" if images_per_class == 1 else "real sub-class centres", real
    for name, kind in OBJECTIVES.items():
        if kind.compute_targets:
            indices = np.arange(len(entry.dataset.class_ids))
            yield f"targets of {name}", kind.compute_targets(entry, indices, real, 0)
