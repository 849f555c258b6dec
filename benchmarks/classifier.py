"""Time and accuracy of the linear classifier and of sub-class centres, by settings and against scikit-learn.

    python benchmarks/classifier.py [--json FILE] [--quick] [--features FOLDER] [--device cuda]
                                    [--no-scikit-learn]

1. *Before and now*, on real features: Fashion-MNIST through lite0 at 96 px, 60,000 x 1,280 x 10 classes. The
   settings before (penalty chosen on nine tenths of up to 131,072 samples, final tolerance 1e-4) beside
   today's, in one run: seconds, passes, top-1 on a fifth of the training split that was held out of it
   (tuning), and on the held-out split.
2. *Against scikit-learn* on the same: its LogisticRegression is fitted for every C of a grid, on standardised
   features in memory, with nine tenths of the training split and with all of it. Its C is chosen by the same
   tenth; the best C on the held-out split, which no method may use, is the bar: ours should be at most 0.3
   points below it.
3. *1,000 classes x 768*, synthetic and on disk, 200 samples of each class: before and now, with the time of
   1,280,000 samples projected from the passes of the final fit, and the sub-class centres.

Keep the real features in between runs with --features FOLDER. --quick takes 5,000 images of Fashion-MNIST and
30 samples per class of the other.
"""

import argparse
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import read_process_bytes, write_json
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from sfm.backbones.build import load_backbone
from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.events import no_progress
from sfm.pipeline import linear_classifier, logistic
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.entry_rows import select_entry_rows
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import run_and_track_pass, stage_tasks
from sfm.pipeline.folds import make_fold_mask
from sfm.pipeline.linear_classifier import measure_top1_and_top5, train_classifier
from sfm.pipeline.partition_tasks import make_tasks
from sfm.pipeline.pass_result import collect_pass_result
from sfm.pipeline.runtime import count_cores, extraction_runtime, optimize_for_inference
from sfm.pipeline.selection import select_samples_if_labels_known
from sfm.pipeline.sources import open_source
from sfm.pipeline.staged_features import StagedFeatures
from sfm.pipeline.staging import Staging
from sfm.pipeline.sub_class_centres import compute_sub_class_centres
from sfm.stats_store.digests import BLOCK_ROWS

PENALTY_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""C of scikit-learn: the inverse of the penalty on the sum of the losses."""

FIT_SETTINGS: dict[str, dict[str, float]] = {
    "before": {"choosing_rows": 131_072, "few_rows": 0, "path_iterations": 1000, "tolerance": 1e-4},
    "now": {
        "choosing_rows": linear_classifier.MAX_SELECTION_ROWS,
        "few_rows": linear_classifier.MAX_SMALL_DATASET_ROWS,
        "path_iterations": linear_classifier.MAX_PATH_ITERATIONS,
        "tolerance": logistic.GRADIENT_TOLERANCE,
    },
}

CLASSES, FEATURES = 1000, 768
N_IMAGENET_SAMPLES = 1_280_000
SUB_CLASS_COUNTS = (5, 10)


def time_function(work: Callable[[], Any]) -> tuple[Any, float]:
    """Call a function; return its result and its seconds."""
    began = time.perf_counter()
    fit = work()
    return fit, time.perf_counter() - began


def run_in_new_process(work: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def parse_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def stage_real_features(folder: Path, quick: bool, device: str) -> tuple[StagedFeatures, StagedFeatures]:
    """Return training and held-out features of Fashion-MNIST through lite0; extract them if missing."""
    spec = "builtin:fashion-mnist-6k" if quick else "idx:/usr/share/datasets/fashion-mnist"
    config = ExtractConfig(source=spec, store="unused", backbone=["lite0"], image_size=96, device=device)
    source, staging = open_source(spec), Staging(folder / ("quick" if quick else "full"))
    staging.root.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone("lite0", image_size=96, device=device)
    tasks = make_tasks(source, select_samples_if_labels_known(config, source))
    fast = optimize_for_inference([backbone], "float32")
    with extraction_runtime(source, backbone.device.type, count_cores()) as runtime:
        run_and_track_pass(
            stage_tasks(source, tasks, fast, staging, PassOptions(), runtime),
            tasks,
            tasks,
            staging,
            no_progress,
        )
    (part,) = select_entry_rows(config, collect_pass_result(config, source, tasks, staging), staging)
    return part.open_train_features(staging, backbone.card.hash), part.open_test_features(
        staging, backbone.card.hash
    )


def fit_classifier(
    train: StagedFeatures, classes: int, features: int, device: str, name: str
) -> tuple[Any, dict[str, Any]]:
    """Train our classifier with named settings; return it with its passes and seconds."""
    settings = FIT_SETTINGS[name]
    linear_classifier.MAX_SELECTION_ROWS = int(settings["choosing_rows"])
    linear_classifier.MAX_SMALL_DATASET_ROWS = int(settings["few_rows"])
    linear_classifier.MAX_PATH_ITERATIONS = int(settings["path_iterations"])
    moments, moments_seconds = time_function(lambda: accumulate_moments(train, classes, features))
    passes: list[tuple[int, float]] = []
    began = time.perf_counter()
    fit = train_classifier(
        train,
        moments,
        parse_device(device),
        report_pass_rows=lambda rows: passes.append((rows, time.perf_counter() - began)),
        gradient_tolerance=settings["tolerance"],
    )
    seconds, samples = time.perf_counter() - began, len(train.concatenate_labels())
    last = next((at for at, (rows, _) in enumerate(passes) if rows == samples), len(passes))
    choosing = passes[last - 1][1] if last else 0.0
    return fit, {
        "samples": samples,
        "moments_seconds": moments_seconds,
        "seconds": seconds,
        "choosing_seconds": choosing,
        "choosing_passes": last,
        "choosing_rows": passes[0][0],
        "fitting_passes": len(passes) - last,
        "l2": fit.l2,
        "converged": fit.converged,
    }


def measure_our_classifier(
    train: StagedFeatures, test: StagedFeatures, device: str, name: str
) -> dict[str, Any]:
    """Train our classifier on four fifths and on all of the training split, and compute centres."""
    labels = train.concatenate_labels()
    classes, features = len(np.unique(labels)), next(iter(train))[0].shape[1]
    held = make_fold_mask(labels, 0, 5)
    tuned, _ = fit_classifier(train.select_rows(~held), classes, features, device, name)
    fit, figures = fit_classifier(train, classes, features, device, name)
    _, centre_seconds = time_function(
        lambda: compute_sub_class_centres(train, labels, classes, features, SUB_CLASS_COUNTS, seed=0)
    )
    return {
        **figures,
        "features": features,
        "classes": classes,
        "centre_seconds": centre_seconds,
        "tuning_top1": measure_top1_and_top5(train.select_rows(held), tuned)[0],
        "held_out_top1": measure_top1_and_top5(test, fit)[0],
        "peak_bytes": read_process_bytes("VmHWM"),
    }


def measure_scikit_learn(
    train: StagedFeatures, test: StagedFeatures, grid: tuple[float, ...]
) -> dict[str, Any]:
    """Fit scikit-learn's LogisticRegression for every C, on nine tenths and on all of the training split."""
    rows, labels = np.concatenate([x for x, _ in train]), train.concatenate_labels()
    mean, std = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-6 * std.max(), std, 1.0)
    rows = ((rows - mean) / std).astype(np.float32)
    seen = ((np.concatenate([x for x, _ in test]) - mean) / std).astype(np.float32)
    held = make_fold_mask(labels, 0, linear_classifier.VALIDATION_FOLDS)
    tried = []
    for c in grid:
        part, part_seconds = time_function(
            lambda c=c: LogisticRegression(C=c, max_iter=2000).fit(rows[~held], labels[~held])
        )
        whole, seconds = time_function(lambda c=c: LogisticRegression(C=c, max_iter=2000).fit(rows, labels))
        tried.append(
            {
                "C": c,
                "choosing_seconds": part_seconds,
                "seconds": seconds,
                "iterations": int(whole.n_iter_.max()),
                "validation_top1": part.score(rows[held], labels[held]),
                "held_out_top1": whole.score(seen, test.concatenate_labels()),
            }
        )
    return {"tried": tried, "peak_bytes": read_process_bytes("VmHWM")}


def compare_on_real_features(folder: Path, quick: bool, device: str, scikit_learn: bool) -> dict[str, Any]:
    """Compare both classifiers on real features, in a new process each."""
    train, test = run_in_new_process(stage_real_features, folder, quick, device)
    fit = {
        name: run_in_new_process(measure_our_classifier, train, test, device, name) for name in FIT_SETTINGS
    }
    if not scikit_learn:
        return {"ours": fit}
    other = run_in_new_process(
        measure_scikit_learn, train, test, PENALTY_GRID[1:6:2] if quick else PENALTY_GRID
    )
    best = max(other["tried"], key=lambda row: row["held_out_top1"])
    return {
        "ours": fit,
        "scikit_learn": other,
        "scikit_learn_chosen": max(other["tried"], key=lambda row: row["validation_top1"]),
        "scikit_learn_best": best,
        "points_below_the_best": 100 * (best["held_out_top1"] - fit["now"]["held_out_top1"]),
    }


def write_synthetic_features(folder: Path, samples: int) -> StagedFeatures:
    """Write features of Gaussian classes, correlated like those of networks, in random order."""
    rng = np.random.default_rng(0)
    mix, _ = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))
    mix = (mix * np.arange(1, FEATURES + 1) ** -0.5).T.astype(np.float32)
    middles = 2.2 * rng.standard_normal((CLASSES, FEATURES), dtype=np.float32)
    middles[:, 64:] = 0
    labels = rng.permutation(np.arange(samples, dtype=np.int32) % CLASSES)
    files = []
    for number, start in enumerate(range(0, samples, BLOCK_ROWS)):
        own = labels[start : start + BLOCK_ROWS]
        files.append(folder / f"{number:06d}.npy")
        np.save(files[-1], (middles[own] + rng.standard_normal((len(own), FEATURES), dtype=np.float32)) @ mix)
    return StagedFeatures(tuple(files), tuple(np.split(labels, range(BLOCK_ROWS, samples, BLOCK_ROWS))))


def measure_full_shape(train: StagedFeatures, device: str, name: str) -> dict[str, Any]:
    """Train on 1,000 classes, and project the seconds to the samples of ImageNet."""
    labels = train.concatenate_labels()
    held = make_fold_mask(labels, 0, 5)
    part = train.select_rows(~held)
    fit, figures = fit_classifier(part, CLASSES, FEATURES, device, name)
    scale = N_IMAGENET_SAMPLES / figures["samples"]
    final = (figures["seconds"] - figures["choosing_seconds"]) * scale
    _, centre_seconds = time_function(
        lambda: compute_sub_class_centres(
            part, part.concatenate_labels(), CLASSES, FEATURES, SUB_CLASS_COUNTS, seed=0
        )
    )
    return {
        **figures,
        "tuning_top1": measure_top1_and_top5(train.select_rows(held), fit)[0],
        "centre_seconds": centre_seconds,
        "projected_seconds": figures["choosing_seconds"] + final,
        "projected_moments_seconds": figures["moments_seconds"] * scale,
        "projected_centre_seconds": centre_seconds * scale,
        "peak_bytes": read_process_bytes("VmHWM"),
    }


def compare_at_full_shape(quick: bool, device: str) -> dict[str, Any]:
    """Measure all settings on 1,000 classes, in a new process each."""
    with tempfile.TemporaryDirectory() as folder:
        train = run_in_new_process(write_synthetic_features, Path(folder), (30 if quick else 200) * CLASSES)
        return {name: run_in_new_process(measure_full_shape, train, device, name) for name in FIT_SETTINGS}


def print_classifier_tables(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    real = result["real"]
    table = Table(title="Before and now")
    for column in (
        "",
        "choosing s (passes)",
        "fitting s (passes)",
        "classifier s",
        "centres s",
        "tuning top-1 %",
        "held-out top-1 %",
        "projected s",
        "peak MiB",
    ):
        table.add_column(column, justify="right" if column else "left")
    for title, rows in (("Fashion-MNIST", real["ours"]), ("1,000 x 768", result["full_shape"])):
        for name, row in rows.items():
            fitting = row["seconds"] - row["choosing_seconds"]
            table.add_row(
                f"{title}, {row['samples']:,}, {name}",
                f"{row['choosing_seconds']:.1f} ({row['choosing_passes']} of {row['choosing_rows']:,})",
                f"{fitting:.1f} ({row['fitting_passes']})",
                f"{row['seconds']:.1f}{'' if row['converged'] else ', not converged'}",
                f"{row['centre_seconds']:.1f}",
                f"{100 * row['tuning_top1']:.2f}",
                f"{100 * row['held_out_top1']:.2f}" if "held_out_top1" in row else "",
                f"{row['projected_seconds']:.0f}" if "projected_seconds" in row else "",
                f"{row['peak_bytes'] / 2**20:.0f}",
            )
    console.print(table)
    if "scikit_learn" not in real:
        return
    table = Table(title="scikit-learn on Fashion-MNIST")
    for column in ("", "C", "iterations", "seconds", "held-out top-1 %"):
        table.add_column(column, justify="right" if column else "left")
    for row in real["scikit_learn"]["tried"]:
        marks = ["chosen"] * (row == real["scikit_learn_chosen"]) + ["best"] * (
            row == real["scikit_learn_best"]
        )
        figures = (str(row["iterations"]), f"{row['seconds']:.1f}", f"{100 * row['held_out_top1']:.2f}")
        table.add_row(", ".join(marks), f"{row['C']:.0e}", *figures)
    console.print(table)
    console.print(f"below scikit-learn's best C: {real['points_below_the_best']:.2f} points (bar 0.3)")


def main() -> None:
    """Measure, print, and write the figures."""
    configure_malloc_to_keep_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="small cases, as a smoke test")
    parser.add_argument("--features", type=Path, help="folder to keep the real features in, between runs")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--no-scikit-learn", action="store_true", help="leave out the slow comparison")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        features_folder = arguments.features or Path(folder)
        real = compare_on_real_features(
            features_folder, arguments.quick, arguments.device, not arguments.no_scikit_learn
        )
    result = {
        "benchmark": "classifier",
        "device": torch.cuda.get_device_name()
        if parse_device(arguments.device).type == "cuda"
        else platform.machine(),
        "cores": count_cores(),
        "versions": {p: version(p) for p in ("torch", "scipy", "scikit-learn")},
        "real": real,
        "full_shape": compare_at_full_shape(arguments.quick, arguments.device),
    }
    print_classifier_tables(result)
    write_json(result, arguments.json)


if __name__ == "__main__":
    main()
