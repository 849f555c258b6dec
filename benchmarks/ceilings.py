"""What targets allow: accuracy of a linear head that is trained on features set by hand, without any image.

    python benchmarks/ceilings.py --store URL --dataset NAME@tuning [--backbone lite0 ...] [--ipc 1 10]

The head is that of `sfm evaluate --mode linear`: five seeds, 1,000 epochs. It is scored on the features that
a tuning entry holds out, and on samples drawn from Gaussian classes, as `sfm distill --dry-run` does it.

real
    Class means, or sub-class centres.
discriminant
    Global mean plus the directions of a linear discriminant at the size of the means' (one per class only).
    The covariance is shrunk: a multiple of the mean variance is added to the diagonal.
corrected
    As `--objective sfm-corrected`, at several weights of the distance from the real centres.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sfm.api import open_store
from sfm.distill.backbone_entries import find_candidate_summaries
from sfm.distill.corrected_means import CorrectionOptions, correct_centres, estimate_ceiling
from sfm.distill.objective import ClassCentres, read_target_centres, read_within_covariance
from sfm.distill.target_estimate import compute_target_flow_cosine
from sfm.eval.head_accuracy import compute_accuracy_by_seed
from sfm.eval.linear_probe import INITIAL_STD, train_linear_heads
from sfm.eval.training import RandomStreamPurpose, draw_initial_weights_by_seed, make_batch_schedule
from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
from sfm.stats_store.store import Entry

SEEDS, EPOCHS = 5, 1000
SHRINKAGES = (1, 10, 100)
DISTANCE_WEIGHTS = (100.0, 30.0, 10.0, 3.0, 1.0)


def train_and_score(entry: Entry, centres: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation over seeds of the held-out accuracy of a head, in percent."""
    classes, per_class, features = centres.shape
    rows = torch.from_numpy(centres.reshape(-1, 1, features).astype(np.float32))
    labels = torch.arange(classes).repeat_interleave(per_class)
    indices = np.tile(np.arange(len(rows)), (SEEDS, 1))
    schedule = make_batch_schedule(0, indices, epoch_count=EPOCHS, views_per_image=1)
    weights = draw_initial_weights_by_seed(
        0, RandomStreamPurpose.HEAD, (SEEDS, classes, features), INITIAL_STD
    )
    heads = train_linear_heads(rows, labels, schedule, weights)
    held_out = torch.from_numpy(entry.read_array("test/feature").astype(np.float32))
    score = compute_accuracy_by_seed(heads, held_out, torch.from_numpy(entry.read_array("test/label")).long())
    return 100 * float(np.mean(score.top1)), 100 * float(np.std(score.top1, ddof=1))


def make_discriminant_centres(real: ClassCentres, covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return centres whose flow is along discriminant directions, of the size of the real one."""
    middle = real.class_means.mean(0)
    deviations = real.class_means - middle
    ridge = shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    directions = np.linalg.solve(covariance + ridge, deviations.T).T
    return (middle + directions * np.linalg.norm(deviations) / np.linalg.norm(directions))[:, None]


def list_candidates(real: ClassCentres, covariance: np.ndarray) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yield name, seconds and centres of every candidate."""
    yield "real", 0.0, real.own_centres
    if real.own_centres.shape[1] == 1:
        for shrinkage in SHRINKAGES:
            yield (
                f"discriminant, {shrinkage}",
                0.0,
                make_discriminant_centres(real, covariance, shrinkage),
            )
    for weight in DISTANCE_WEIGHTS:
        start = time.perf_counter()
        options = CorrectionOptions(distance_weight=weight)
        corrected = correct_centres(real.class_means, real.own_centres, covariance, options)
        yield f"corrected, {weight:g}", time.perf_counter() - start, corrected


def measure_ceilings(entry: Entry, ipc: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every candidate."""
    covariance = read_within_covariance(entry)
    if covariance is None:
        raise SystemExit(f"{entry.dataset.name} has no scatter within classes")
    real = read_target_centres(entry, ipc, np.arange(len(entry.dataset.class_ids)))
    for name, seconds, centres in list_candidates(real, covariance):
        shift = (centres - real.own_centres).mean(axis=1)
        mean, std = train_and_score(entry, centres)
        yield {
            "backbone": entry.summary.backbone,
            "ipc": ipc,
            "targets": name,
            "held_out": mean,
            "std": std,
            "drawn": 100 * estimate_ceiling(real.class_means, centres, covariance, 0),
            "cosine": compute_target_flow_cosine(real, ClassCentres(real.class_means + shift, centres)),
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--dataset", required=True, help="NAME@tuning")
    parser.add_argument("--backbone", nargs="+", default=["lite0"])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1])
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    summaries = list_visible_and_pinned_summaries(store, arguments.dataset)
    rows = []
    table = Table("backbone", "ipc", "targets", "held out %", "drawn %", "cosine", "seconds")
    for backbone in arguments.backbone:
        entry = store.open_entry(
            find_candidate_summaries(store, summaries, arguments.dataset, backbone, None)[0]
        )
        for ipc in arguments.ipc:
            for row in measure_ceilings(entry, ipc):
                rows.append(row)
                table.add_row(
                    backbone,
                    str(ipc),
                    row["targets"],
                    f"{row['held_out']:.1f} ± {row['std']:.1f}",
                    f"{row['drawn']:.1f}",
                    f"{row['cosine']:.3f}",
                    f"{row['seconds']:.0f}",
                )
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
