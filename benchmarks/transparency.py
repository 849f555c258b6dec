"""Accuracy gained by compositing transparent images: emoji with their alpha dropped, on white, and on black.

    python benchmarks/transparency.py --emoji package [--json FILE] [--quick]

The images are Twitter's emoji, 64 px, as an npm package holds them: optimised PNG files, whose transparent
pixels have arbitrary colours. A class is a subgroup of Unicode ("animal-mammal",
"tool", ...) with eight emoji or more; a third of each, at random, is held out. Variants of skin colour are
left out, so no emoji is in both splits in another colour.

Three datasets of the same emoji go through lite0 at 96 px:

alpha dropped
    converted to RGB beforehand, which shows the hidden colours: what `sfm` did until it composited
on white, on black
    the files as they are, with ?background=white and ?background=black

Scored are the classifier trained on the full data, and one distilled image per class of the ten largest
classes (a fresh linear head, means over seeds).

Fetch the package (59 MB) by `npm pack emoji-datasource-twitter@14.0.0` and `tar xzf` of what that brings.
--quick only shows that it runs.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, distill, evaluate, extract

MIN_EMOJI_PER_CLASS = 8
N_LARGEST_CLASSES = 10
TRANSPARENCY_VARIANTS = {
    "alpha dropped": ("dropped", ""),
    "on white": ("emoji", "white"),
    "on black": ("emoji", "black"),
}


def read_emoji(package: Path) -> dict[str, dict[str, bytes]]:
    """Return the contents of the PNG files of emoji, by subgroup and file name."""
    listed, images = package / "emoji.json", package / "img" / "twitter" / "64"
    if not listed.is_file():
        raise SystemExit(f"{listed} is not there: see --help for how to fetch it")
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    for each in json.loads(listed.read_bytes()):
        if each["has_img_twitter"]:
            found[each["subcategory"]][each["image"]] = (images / each["image"]).read_bytes()
    return {name: own for name, own in found.items() if len(own) >= MIN_EMOJI_PER_CLASS}


def write_datasets(groups: dict[str, dict[str, bytes]], folder: Path) -> None:
    """Write the emoji as they are and without alpha, and a list of the largest classes."""
    rng = np.random.default_rng(0)
    for name, own in groups.items():
        held_out = set(rng.permutation(sorted(own))[: len(own) // 3].tolist())
        for file, data in own.items():
            place = Path("val" if file in held_out else "train", name.replace(" ", "-"), file)
            for dataset in ("emoji", "dropped"):
                (folder / dataset / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / "emoji" / place).write_bytes(data)
            with Image.open(folder / "emoji" / place) as image:
                image.convert("RGBA").convert("RGB").save(folder / "dropped" / place)
    largest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:N_LARGEST_CLASSES]
    (folder / "largest.txt").write_text("".join(f"{name.replace(' ', '-')}\n" for name in largest))


def measure_variant(folder: Path, variant: str, steps: int, seeds: int) -> dict[str, Any]:
    """Extract a variant with all and with the largest classes, distil the latter, and score both."""
    dataset, background = TRANSPARENCY_VARIANTS[variant]
    over = f"background={background}" if background else ""
    store, name = str(folder / f"store-{dataset}-{background}"), f"{dataset}-largest"
    common = {"store": store, "backbone": ["lite0"], "image_size": 96, "sub_classes": (2,)}
    all_classes = f"folder:{folder / dataset}" + (f"?{over}" if over else "")
    of_largest = f"folder:{folder / dataset}?classes={folder / 'largest.txt'}" + (f"&{over}" if over else "")
    full = extract(ExtractConfig(source=all_classes, **common))
    small = extract(ExtractConfig(source=of_largest, name=name, **common))
    top1 = []
    for seed in range(seeds):
        run = folder / f"run-{dataset}-{background}-{seed}"
        distill(DistillConfig(store=store, backbone="lite0", dataset=name, out=run, steps=steps, seed=seed))
        rows = evaluate(EvaluateConfig(run=run, store=store, mode=["linear"], seeds=1)).rows
        top1.append(next(row.top1_mean for row in rows if row.images == "distilled" and row.mode == "linear"))
        shutil.rmtree(run)
    summary = full.published[0].summary
    return {
        "variant": variant,
        "images": summary.train_samples + summary.test_samples,
        "composited": full.cards[0].composited,
        "classes": summary.classes,
        "full_top1": summary.held_out_top1,
        "largest_full_top1": small.published[0].summary.held_out_top1,
        "largest_distilled_top1": top1,
        "steps": steps,
    }


def print_variant_table(rows: list[dict[str, Any]]) -> None:
    """Print a table of the variants."""
    first = rows[0]
    seeds = len(first["largest_distilled_top1"])
    table = Table(
        title=f"{first['images']} emoji, held-out top-1 %; distilled: 1 image per class, "
        f"{first['steps']} steps, {seeds} seed(s)"
    )
    ten = f"{N_LARGEST_CLASSES} classes"
    for column in (
        "",
        "composited",
        f"{first['classes']} classes, full data",
        f"{ten}, full",
        f"{ten}, distilled",
    ):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        top1 = [100 * each for each in row["largest_distilled_top1"]]
        spread = f" ± {statistics.stdev(top1):.1f}" if seeds > 1 else ""
        table.add_row(
            row["variant"],
            str(row["composited"]),
            f"{100 * row['full_top1']:.1f}",
            f"{100 * row['largest_full_top1']:.1f}",
            f"{statistics.fmean(top1):.1f}{spread}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emoji", type=Path, default=Path("package"), help="the package, unpacked")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transparency.json"))
    parser.add_argument("--seeds", type=int, default=3, help="distillations per variant")
    parser.add_argument("--steps", type=int, default=1000, help="of each distillation")
    parser.add_argument("--quick", action="store_true", help="two steps, one seed, as a smoke test")
    arguments = parser.parse_args()
    steps, seeds = (2, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        write_datasets(read_emoji(arguments.emoji), Path(scratch))
        rows = [measure_variant(Path(scratch), variant, steps, seeds) for variant in TRANSPARENCY_VARIANTS]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"benchmark": "transparency", "rows": rows}, indent=1) + "\n")
    print_variant_table(rows)


if __name__ == "__main__":
    main()
