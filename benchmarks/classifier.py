"""How good the linear classifier is and what it costs, against scikit-learn's, and at the size of ImageNet.

    python benchmarks/classifier.py [--json FILE] [--quick] [--features FOLDER] [--device cuda]

1. *Against scikit-learn* on real features: Fashion-MNIST through lite0 at 96 px, 60,000 x 1,280 x 10 classes.
   Ours chooses its penalty on a part of the training split. scikit-learn's LogisticRegression is fitted for
   every C of a grid, on standardised features in memory, with nine tenths of the training split and with all
   of it. Its C is chosen by the same tenth; the best C on the held-out split, which nobody may choose, is the
   bar: ours should be at most 0.3 points below it.
2. *At full shape*, 1,280,000 x 768 x 1,000 classes, synthetic and on disk: moments, the choice of the penalty
   and the sub-class centres as they are; of the final fit a few passes. The passes that it takes are counted
   on the samples that chose the penalty, so its time is a projection. The peak is that of a process of its
   own; it should stay below 4 GB.

Keep the real features in between runs with --features FOLDER. --quick takes 5,000 images of Fashion-MNIST,
and a thirtieth of the samples at full shape, which are read again in every pass all the same.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from sfm.backbones.build import load_backbone
from sfm.events import nobody
from sfm.pipeline import classifier
from sfm.pipeline.centres import sub_class_centres
from sfm.pipeline.classifier import (
    Fit,
    Spread,
    accuracies,
    at_most,
    choose_penalty,
    every_nth,
    fit,
    spread_of,
    standardised,
    train_classifier,
)
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.equipment import cores, equipped, quickest
from sfm.pipeline.features import Rules, follow, stage
from sfm.pipeline.moments import accumulate
from sfm.pipeline.parts import gather, parts_of
from sfm.pipeline.selection import selection_of
from sfm.pipeline.sources import open_source
from sfm.pipeline.staging import Staged, Staging, tasks_of
from sfm.stats_store.digest import BLOCK_ROWS

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""C of scikit-learn: the inverse of the penalty on the sum of the losses."""

CLASSES, FEATURES = 1000, 768
PASSES = 3
SUB_CLASSES = (5, 10)


@dataclass
class Counted:
    """Blocks that can be passed over again and again; counts how often."""

    blocks: Any
    passes: int = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.blocks)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what work gives, and its seconds."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def peak_bytes() -> int:
    """Return the largest size that this process has had in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def in_a_process(work: Callable[..., Any], *arguments: object) -> Any:
    """Do work in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def device_of(name: str) -> torch.device:
    """Return the device that a name means."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def real_features(folder: Path, quick: bool, device: str) -> tuple[Staged, Staged]:
    """Return features of Fashion-MNIST through lite0, training and held-out; extracted if they are absent."""
    spec = "builtin:fashion-mnist-6k" if quick else "idx:/usr/share/datasets/fashion-mnist"
    config = ExtractConfig(source=spec, store="unused", backbone=["lite0"], image_size=96, device=device)
    source, staging = open_source(spec), Staging(folder / ("quick" if quick else "full"))
    staging.root.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone("lite0", image_size=96, device=device)
    tasks = tasks_of(source, selection_of(config, source))
    fast = quickest([backbone], "float32")
    with equipped(source, backbone.device.type, cores()) as equipment:
        follow(stage(source, tasks, fast, staging, Rules(), equipment), tasks, tasks, staging, nobody)
    (part,) = parts_of(config, gather(config, source, tasks, staging), staging)
    return part.staged_train(staging, backbone.card.hash), part.staged_test(staging, backbone.card.hash)


def ours(train: Staged, test: Staged, device: str) -> dict[str, Any]:
    """Train our classifier."""
    labels = train.all_labels()
    classes, features = len(np.unique(labels)), next(iter(train))[0].shape[1]
    moments, moments_seconds = timed(lambda: accumulate(train, classes, features))
    found, seconds = timed(lambda: train_classifier(train, moments, device_of(device)))
    return {
        "samples": len(labels),
        "features": features,
        "classes": classes,
        "moments_seconds": moments_seconds,
        "seconds": seconds,
        "l2": found.l2,
        "iterations": found.iterations,
        "converged": found.converged,
        "held_out_top1": accuracies(test, found)[0],
        "peak_bytes": peak_bytes(),
    }


def theirs(train: Staged, test: Staged, grid: tuple[float, ...]) -> dict[str, Any]:
    """Fit scikit-learn's for every C, on the part of the training split that ours fits, and on all of it."""
    rows, labels = np.concatenate([x for x, _ in train]), train.all_labels()
    mean, std = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-6 * std.max(), std, 1.0)
    rows = ((rows - mean) / std).astype(np.float32)
    seen = ((np.concatenate([x for x, _ in test]) - mean) / std).astype(np.float32)
    held = every_nth(labels, classifier.VALIDATION_EVERY)
    tried = []
    for c in grid:
        part, part_seconds = timed(
            lambda c=c: LogisticRegression(C=c, max_iter=2000).fit(rows[~held], labels[~held])
        )
        whole, seconds = timed(lambda c=c: LogisticRegression(C=c, max_iter=2000).fit(rows, labels))
        tried.append(
            {
                "C": c,
                "choosing_seconds": part_seconds,
                "seconds": seconds,
                "iterations": int(whole.n_iter_.max()),
                "validation_top1": part.score(rows[held], labels[held]),
                "held_out_top1": whole.score(seen, test.all_labels()),
            }
        )
    return {"tried": tried, "peak_bytes": peak_bytes()}


def against_scikit_learn(folder: Path, quick: bool, device: str) -> dict[str, Any]:
    """Compare on real features; each in a process of its own, one after the other."""
    train, test = in_a_process(real_features, folder, quick, device)
    mine = in_a_process(ours, train, test, device)
    other = in_a_process(theirs, train, test, GRID[1:6:2] if quick else GRID)
    chosen = max(other["tried"], key=lambda row: row["validation_top1"])
    best = max(other["tried"], key=lambda row: row["held_out_top1"])
    return {
        "ours": mine,
        "scikit_learn": other,
        "scikit_learn_chosen": chosen,
        "scikit_learn_best": best,
        "scikit_learn_seconds": chosen["seconds"] + sum(row["choosing_seconds"] for row in other["tried"]),
        "points_below_the_best": 100 * (best["held_out_top1"] - mine["held_out_top1"]),
    }


def make_features(folder: Path, samples: int) -> Staged:
    """Write features of Gaussian classes, correlated as those of networks are, in random order."""
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
    return Staged(tuple(files), tuple(np.split(labels, range(BLOCK_ROWS, samples, BLOCK_ROWS))))


def counted_fit(
    train: Staged, spread: Spread, l2: float, start: Fit, device: torch.device
) -> tuple[Fit, int]:
    """Fit, and count the passes that it took."""
    samples = len(train.all_labels())
    rows = Counted(standardised([train], samples, spread, device))
    return fit(rows, samples, spread, l2, start, device), rows.passes


def full_shape(train: Staged, quick: bool, device_name: str) -> dict[str, Any]:
    """Do all that is done with training features, but for most passes of the final fit."""
    if quick:
        classifier.CHOOSING_ROWS = 12 * CLASSES
        classifier.KEPT_BYTES = 4 * FEATURES * classifier.CHOOSING_ROWS
    device, labels = device_of(device_name), train.all_labels()
    moments, moments_seconds = timed(lambda: accumulate(train, CLASSES, FEATURES))
    spread = spread_of(moments)
    zero = Fit(
        torch.zeros(CLASSES, FEATURES, dtype=torch.float64),
        torch.zeros(CLASSES, dtype=torch.float64),
        0,
        False,
    )
    some = at_most(labels, classifier.CHOOSING_ROWS // CLASSES)
    part, size = train.only(some), int(some.sum())
    (l2, start), choosing_seconds = timed(
        lambda: choose_penalty([part], part.all_labels(), spread, device, zero, classifier.L2_PATH)
    )
    rehearsed, passes = counted_fit(part, spread, l2, start, device)
    l2 *= size / len(labels)
    classifier.MOST_ITERATIONS = PASSES
    (_, measured), seconds = timed(lambda: counted_fit(train, spread, l2, start, device))
    classifier_peak = peak_bytes()
    _, centre_seconds = timed(
        lambda: sub_class_centres(train, labels, CLASSES, FEATURES, SUB_CLASSES, seed=0)
    )
    return {
        "samples": len(labels),
        "features": FEATURES,
        "classes": CLASSES,
        "l2": l2,
        "moments_seconds": moments_seconds,
        "choosing_samples": size,
        "choosing_seconds": choosing_seconds,
        "passes_measured": measured,
        "pass_seconds": seconds / measured,
        "passes_expected": passes,
        "converged": rehearsed.converged,
        "classifier_peak_bytes": classifier_peak,
        "centre_seconds": centre_seconds,
        "peak_bytes": peak_bytes(),
    }


def at_full_shape(quick: bool, device: str) -> dict[str, Any]:
    """Measure at full shape in a process of its own, and project."""
    samples = 42_000 if quick else 1_280_000
    with tempfile.TemporaryDirectory() as folder:
        train = in_a_process(make_features, Path(folder), samples)
        found = in_a_process(full_shape, train, quick, device)
    final = found["pass_seconds"] * found["passes_expected"]
    return {**found, "projected_seconds": found["choosing_seconds"] + final}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    real, full = result["real"], result["full_shape"]
    mine = real["ours"]
    shape = f"{mine['samples']:,} x {mine['features']:,} x {mine['classes']}"
    table = Table(title=f"Real features, {shape}")
    for column in ("", "penalty", "iterations", "seconds", "held-out top-1 %", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "sfm",
        f"l2 {mine['l2']:.1e}",
        f"{mine['iterations']}{'' if mine['converged'] else ', not converged'}",
        f"{mine['seconds']:.1f}",
        f"{100 * mine['held_out_top1']:.2f}",
        f"{mine['peak_bytes'] / 2**20:.0f}",
    )
    peak = f"{real['scikit_learn']['peak_bytes'] / 2**20:.0f}"
    for row in real["scikit_learn"]["tried"]:
        mark = [", chosen"] * (row == real["scikit_learn_chosen"]) + [", best"] * (
            row == real["scikit_learn_best"]
        )
        table.add_row(
            f"scikit-learn{''.join(mark)}",
            f"C {row['C']:.0e}",
            str(row["iterations"]),
            f"{row['seconds']:.1f}",
            f"{100 * row['held_out_top1']:.2f}",
            peak,
        )
    console.print(table)
    console.print(
        f"below scikit-learn's best C: {real['points_below_the_best']:.2f} points (bar 0.3); choosing and "
        f"fitting: {mine['seconds']:.1f} s, scikit-learn's grid {real['scikit_learn_seconds']:.1f} s"
    )
    table = Table(title=f"{full['samples']:,} x {full['features']} x {full['classes']:,}, synthetic, on disk")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("moments, s", f"{full['moments_seconds']:.0f}"),
        (f"choosing the penalty on {full['choosing_samples']:,}, s", f"{full['choosing_seconds']:.0f}"),
        ("one pass of the final fit, s", f"{full['pass_seconds']:.2f}"),
        ("passes expected", str(full["passes_expected"]) + ("" if full["converged"] else ", not converged")),
        ("classifier, projected, s", f"{full['projected_seconds']:.0f}"),
        ("sub-class centres, s", f"{full['centre_seconds']:.0f}"),
        ("peak of the classifier, MiB", f"{full['classifier_peak_bytes'] / 2**20:.0f}"),
        ("peak of everything, MiB (bar 3,815)", f"{full['peak_bytes'] / 2**20:.0f}"),
    ):
        table.add_row(name, value)
    console.print(table)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="small cases: does it run?")
    parser.add_argument("--features", type=Path, help="folder to keep the real features in, between runs")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        real = against_scikit_learn(given.features or Path(folder), given.quick, given.device)
    result = {
        "benchmark": "classifier",
        "device": torch.cuda.get_device_name()
        if device_of(given.device).type == "cuda"
        else platform.machine(),
        "cores": cores(),
        "versions": {p: version(p) for p in ("torch", "scipy", "scikit-learn")},
        "real": real,
        "full_shape": at_full_shape(given.quick, given.device),
    }
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
