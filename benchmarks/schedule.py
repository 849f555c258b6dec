"""Accuracy of `sfm distill` by schedule, on a tuning entry; held-out data is not used.

``python benchmarks/schedule.py [--json FILE] [--only NAME ...]``

Each schedule distils ten images of the tuning split's training part on lite0 and scores them, with a linear
head, on the tuning split's held-out part, through lite0 and through lite1.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, distill, evaluate, extract

BUILTIN_DATASET = "fashion-mnist-6k"
SCHEDULES = {
    "1 view, lr .01, 1000 steps": {"views": 1, "learning_rate": 1e-2, "steps": 1000},
    "1 view, lr .02, 1000 steps": {"views": 1, "learning_rate": 2e-2, "steps": 1000},
    "1 view, lr .02, 2000 steps": {"views": 1, "learning_rate": 2e-2, "steps": 2000},
    "1 view, lr .04, 2000 steps": {"views": 1, "learning_rate": 4e-2, "steps": 2000},
    "3 views, lr .01, 1000 steps": {"views": 3, "learning_rate": 1e-2, "steps": 1000},
    "3 views, lr .02, 1000 steps": {"views": 3, "learning_rate": 2e-2, "steps": 1000},
    "3 views, lr .04, 1000 steps": {"views": 3, "learning_rate": 4e-2, "steps": 1000},
    "3 views, lr .02, 1000 steps, grow every 30": {
        "views": 3,
        "learning_rate": 2e-2,
        "steps": 1000,
        "grow_every": 30,
    },
    "3 views, lr .02, 1000 steps, grow every 110": {
        "views": 3,
        "learning_rate": 2e-2,
        "steps": 1000,
        "grow_every": 110,
    },
}


def main() -> None:
    """Run every schedule on one tuning entry and print its accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="store that holds the entries already, or is to hold them")
    parser.add_argument("--seeds", type=int, default=1, help="distillations per schedule")
    parser.add_argument("--only", nargs="*", help="run these schedules alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = arguments.store or f"{scratch}/store"
        extract(
            ExtractConfig(
                source=f"builtin:{BUILTIN_DATASET}",
                store=store,
                backbone=["lite0", "lite1"],
                image_size=96,
                exemplars=8,
                tune_fraction=0.2,
            )
        )
        rows = [
            distill_and_score(name, schedule, store, Path(scratch), seed)
            for name, schedule in SCHEDULES.items()
            if not arguments.only or name in arguments.only
            for seed in range(arguments.seeds)
        ]
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"dataset": f"{BUILTIN_DATASET}@tuning", "rows": rows}, indent=1)
        )
    table = Table(title=f"{BUILTIN_DATASET}@tuning, distilled on lite0")
    for column in ("schedule", "seed", "lite0 top-1 %", "lite1 top-1 %", "loss", "seconds", "peak MiB"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for row in rows:
        table.add_row(
            row["schedule"],
            str(row["seed"]),
            f"{100 * row['lite0']:.1f}",
            f"{100 * row['lite1']:.1f}",
            f"{row['loss']:.3f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
    Console(width=120).print(table)


def distill_and_score(
    name: str,
    schedule: dict[str, Any],
    store: str,
    scratch: Path,
    seed: int,
    dataset: str = f"{BUILTIN_DATASET}@tuning",
    backbones: Sequence[str] = ("lite0", "lite1"),
) -> dict[str, Any]:
    """Distil with one schedule, and score the images on the held-out part of the tuning split."""
    out = scratch / f"{name.replace(' ', '-')}-{seed}"
    run = distill(
        DistillConfig(
            store=store,
            backbone="lite0",
            image_size=96,
            dataset=dataset,
            out=out,
            seed=seed,
            resume=True,
            **schedule,
        )
    )
    scores = evaluate(EvaluateConfig(run=out, store=store, backbone=list(backbones), mode=["linear"]))
    top1 = {row.backbone: row.top1_mean for row in scores.rows if row.images == "distilled"}
    return {
        "schedule": name,
        "seed": seed,
        **schedule,
        **top1,
        "loss": run.record["loss"],
        "seconds": run.record["wall_seconds"],
        "peak_bytes": run.record["peak_memory_bytes"],
    }


if __name__ == "__main__":
    main()
