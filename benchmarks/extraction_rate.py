"""What extraction costs beyond the forward pass: images/s of the features pass against a bare loop.

``python benchmarks/extraction_rate.py [--json FILE]``

The bare loop calls the same frozen model on normalised batches that lie in memory already; the pass reads,
hashes, decodes, resizes, crops, normalises, runs the model, checks and stages to disk. Rounds alternate.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sfm.backbones.build import Backbone, load_backbone
from sfm.events import nobody
from sfm.pipeline.features import BATCH, stage_features
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.staging import Staging, partitions


def bare(backbone: Backbone, images: int, size: int) -> float:
    """Return images/s of `model(batch)` on a batch that is in memory, in the model's own layout."""
    batch = torch.rand(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        started = time.perf_counter()
        for _ in range(images // BATCH):
            backbone.model(batch)
        return images // BATCH * BATCH / (time.perf_counter() - started)


def staged(backbone: Backbone, source: Source, per_class: int) -> float:
    """Return images/s of the features pass over real images."""
    with tempfile.TemporaryDirectory() as folder:
        work = partitions(source, per_class)
        return stage_features(source, work, [backbone], Staging(Path(folder)), nobody).images_per_second


def main() -> None:
    """Alternate both for several rounds and print rates and the ratio."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--backbone", default="lite0")
    arguments.add_argument("--image-size", type=int, default=96)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--per-class", type=int, default=100, help="images per class and split, per round")
    arguments.add_argument("--json", type=Path, help="write the figures here")
    given = arguments.parse_args()
    source = open_source("builtin:fashion-mnist-6k")
    backbone = load_backbone(given.backbone, image_size=given.image_size)
    images = 2 * 10 * min(given.per_class, 100)
    bare(backbone, 10 * BATCH, given.image_size)
    rounds = [
        (bare(backbone, images, given.image_size), staged(backbone, source, given.per_class))
        for _ in range(given.rounds)
    ]
    ratio = statistics.median(s / b for b, s in rounds)
    table = Table(title=f"{given.backbone} at {given.image_size} px, {torch.get_num_threads()} threads")
    for column in ("round", "bare model(batch), images/s", "features pass, images/s", "ratio"):
        table.add_column(column, justify="right")
    for number, (b, s) in enumerate(rounds):
        table.add_row(str(number), f"{b:.0f}", f"{s:.0f}", f"{s / b:.2f}")
    Console(width=120).print(table)
    print(f"median ratio {ratio:.2f} (bar: at least 0.85)")
    if given.json:
        figures = {"rounds": [{"bare": b, "pass": s} for b, s in rounds], "median_ratio": ratio}
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
