"""Time and accuracy of the linear probe of `sfm evaluate`, against a plain training loop.

The plain loop trains one seed after the other, draws a new view of every image in every epoch and sends it
through the backbone. `sfm evaluate` computes the features of 50 views per image and seed once, and trains all
seeds side by side. Both follow one protocol: Adam, learning rate 1e-3 * B / 256, cosine, 1,000 epochs.

Time is measured with 100 images of noise: no data set of 100 classes comes with this package, and time does
not depend on what the images show. The plain loop's time is that of a few epochs, scaled, unless --whole is
given. Accuracy is measured with ten images distilled from Fashion-MNIST, by both loops in full.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --quick --json evaluation.json
    python benchmarks/evaluation.py --run ./distilled --store ./store
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import write_json
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, distill, extract, open_store
from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.crops import draw_crops
from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.eval.distilled_run import read_distilled_run
from sfm.eval.head_accuracy import LinearHeads, compute_accuracy_by_seed
from sfm.eval.image_sets import ImageSet
from sfm.eval.linear_probe import INITIAL_STD, train_linear_heads
from sfm.eval.mode_training import make_separate_views_schedule, split_views_between_seeds
from sfm.eval.result import compute_mean_and_sample_std
from sfm.eval.training import MAX_BATCH_SIZE, RandomStreamPurpose, draw_initial_weights_by_seed
from sfm.eval.view_features import LabelledImages, compute_view_features, draw_view_crops
from sfm.random_streams import make_rng

DISTILLED_DATASET = "fashion-mnist-6k"
BAR_SECONDS, BAR_RATIO = 120, 10


def init_head_weights(images: LabelledImages, features: int, config: EvaluateConfig) -> Tensor:
    """Draw the initial weights of both loops, shape (seed, class, feature)."""
    return draw_initial_weights_by_seed(
        config.seed,
        RandomStreamPurpose.HEAD,
        (config.seeds, int(images.labels.max()) + 1, features),
        INITIAL_STD,
    )


def train_by_evaluate(
    backbone: Backbone, images: LabelledImages, config: EvaluateConfig
) -> tuple[LinearHeads, dict[str, float]]:
    """Train heads as `sfm evaluate` does; return them and the seconds of views and training."""
    began = time.perf_counter()
    whole = ImageSet("distilled", images, config.seeds)
    crops = draw_view_crops(images, config.seeds * config.views, config.seed, config.crop_edge)
    pool = compute_view_features(backbone, images, crops)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    viewed = time.perf_counter()
    own = split_views_between_seeds(pool, whole, config)
    labels = torch.from_numpy(images.labels).to(pool.device).repeat_interleave(config.seeds)
    start = init_head_weights(images, pool.shape[2], config)
    heads = train_linear_heads(own, labels, make_separate_views_schedule(whole, len(own), config), start)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return heads, {"views": viewed - began, "training": time.perf_counter() - viewed}


def train_in_plain_loop(
    backbone: Backbone, images: LabelledImages, config: EvaluateConfig, seed: int, epochs: int
) -> tuple[nn.Linear, float]:
    """Train one seed in a plain loop for some epochs; return the head and the seconds."""
    began = time.perf_counter()
    count, side = images.pixels.shape[:2]
    labels = torch.from_numpy(images.labels).to(backbone.device)
    head = nn.Linear(backbone.card.features, int(labels.max()) + 1).to(backbone.device)
    with torch.no_grad():
        head.weight.copy_(init_head_weights(images, backbone.card.features, config)[seed])
        head.bias.zero_()
    batch = min(MAX_BATCH_SIZE, count)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3 * batch / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    for epoch in range(epochs):
        rng = make_rng(config.seed, 1, seed, epoch)
        features = compute_view_features(backbone, images, draw_crops(rng, count, side))[:, 0]
        for some in torch.from_numpy(rng.permutation(count)).to(backbone.device).split(batch):
            optimizer.zero_grad()
            cross_entropy(head(features[some].clone()), labels[some]).backward()
            optimizer.step()
        schedule.step()
    return head, time.perf_counter() - began


def compare_times(
    backbone: Backbone, arguments: argparse.Namespace, config: EvaluateConfig
) -> dict[str, Any]:
    """Time both loops on images of noise, one per class."""
    side = round(backbone.card.preprocessing.input_size * 8 / 7)
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.classes, side, side, 3), dtype=np.uint8)
    images = LabelledImages(pixels, np.arange(arguments.classes))
    train_in_plain_loop(backbone, images, config, 0, 1)
    _, parts = train_by_evaluate(backbone, images, config)
    epochs = config.epochs if arguments.whole else min(arguments.plain_epochs, config.epochs)
    seeds = range(config.seeds if arguments.whole else 1)
    seconds = sum(train_in_plain_loop(backbone, images, config, seed, epochs)[1] for seed in seeds)
    scaled = seconds * config.epochs * config.seeds / (epochs * len(seeds))
    return {
        "classes": arguments.classes,
        "fast_seconds": sum(parts.values()),
        "fast_parts": parts,
        "plain_seconds": scaled,
        "plain_measured_epochs": epochs * len(seeds),
        "plain_all_epochs": config.epochs * config.seeds,
        "ratio": scaled / sum(parts.values()),
    }


def compare_accuracies(backbone: Backbone, store: str, run: Path, config: EvaluateConfig) -> dict[str, Any]:
    """Score both loops on held-out features, with the images of a run."""
    distilled = read_distilled_run(run)
    (summary,) = [
        s for s in open_store(store).list_summaries() if s.entry_digest == distilled.record.entry_digest
    ]
    entry = open_store(store).open_entry(summary)
    features = torch.from_numpy(entry.read_array("test/feature").astype(np.float32)).to(backbone.device)
    labels = torch.from_numpy(entry.read_array("test/label").astype(np.int64)).to(backbone.device)
    images = LabelledImages(distilled.pixels, distilled.labels)
    heads, _ = train_by_evaluate(backbone, images, config)
    layers = [
        train_in_plain_loop(backbone, images, config, seed, config.epochs)[0] for seed in range(config.seeds)
    ]
    looped = LinearHeads(
        torch.stack([layer.weight.detach() for layer in layers]),
        torch.stack([layer.bias.detach() for layer in layers]),
    )
    top1 = {
        "fast": compute_accuracy_by_seed(heads, features, labels).top1,
        "plain": compute_accuracy_by_seed(looped, features, labels).top1,
    }
    (fast_mean, fast_std), (plain_mean, plain_std) = (
        compute_mean_and_sample_std(top1[way]) for way in ("fast", "plain")
    )
    return {
        "held_out_samples": len(labels),
        "fast_top1": top1["fast"],
        "plain_top1": top1["plain"],
        "fast_mean": fast_mean,
        "fast_std": fast_std,
        "plain_mean": plain_mean,
        "plain_std": plain_std,
        "difference": fast_mean - plain_mean,
        "deviation": max(fast_std, plain_std),
    }


def make_distilled_run(backbone: str, image_size: int, scratch: Path, quick: bool) -> tuple[str, Path]:
    """Distil ten images and return their store and run directory."""
    store, run = str(scratch / "store"), scratch / "run"
    limit = 60 if quick else None
    extract(
        ExtractConfig(
            source=f"builtin:{DISTILLED_DATASET}",
            store=store,
            backbone=[backbone],
            image_size=image_size,
            limit_per_class=limit,
        )
    )
    distill(
        DistillConfig(
            store=store, backbone=backbone, dataset=DISTILLED_DATASET, out=run, steps=60 if quick else 600
        )
    )
    return store, run


def format_comparison(result: dict[str, Any]) -> str:
    """Return the figures as lines of text."""
    timing, reached = result["time"], result["accuracy"]
    share = f"{timing['plain_measured_epochs']} of {timing['plain_all_epochs']} epochs"
    scaled = (
        "" if timing["plain_measured_epochs"] == timing["plain_all_epochs"] else f", {share} measured, scaled"
    )
    lines = [
        f"{result['backbone']} at {result['image_size']} px, {result['epochs']} epochs x "
        f"{result['seeds']} seeds, {result['device']}, {result['threads']} threads",
        "",
        f"{'':30}{'seconds, ' + str(timing['classes']) + ' classes':>24}{'top-1 %, 10 classes':>24}",
        f"{'views once, seeds together':30}{timing['fast_seconds']:24.1f}"
        f"{100 * reached['fast_mean']:17.1f} ± {100 * reached['fast_std']:4.1f}",
        f"{'plain loop':30}{timing['plain_seconds']:24.1f}"
        f"{100 * reached['plain_mean']:17.1f} ± {100 * reached['plain_std']:4.1f}",
        "",
        f"ratio {timing['ratio']:.1f} (bar {BAR_RATIO}){scaled}",
        f"{timing['fast_seconds']:.0f} s (bar {BAR_SECONDS}), "
        f"{timing['fast_parts']['views']:.0f} s for views, "
        f"{timing['fast_parts']['training']:.0f} s for training",
        f"top-1 differs by {100 * reached['difference']:+.1f} points, one standard deviation is "
        f"{100 * reached['deviation']:.1f} (the larger of the two)",
    ]
    return "\n".join(lines)


def main() -> None:
    configure_malloc_to_keep_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--classes", type=int, default=100, help="images of noise to measure time with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--views", type=int, default=50)
    parser.add_argument("--plain-epochs", type=int, default=20, help="epochs of the plain loop to time")
    parser.add_argument("--whole", action="store_true", help="time all epochs and seeds of the plain loop")
    parser.add_argument("--run", type=Path, help="distilled run to measure accuracy with")
    parser.add_argument("--store", help="its store")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, as a smoke test")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.store is None):
        parser.error("--run and --store belong together")
    if arguments.quick:
        arguments.image_size, arguments.classes, arguments.epochs = 64, 20, 100
        arguments.views, arguments.plain_epochs = 5, 5
    config = EvaluateConfig(
        run=arguments.run or Path(),
        store=arguments.store or ".",
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        views=arguments.views,
        device=arguments.device,
    )
    backbone = load_backbone(arguments.backbone, image_size=arguments.image_size, device=arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        store, run = arguments.store, arguments.run
        if run is None:
            store, run = make_distilled_run(
                arguments.backbone, arguments.image_size, Path(scratch), arguments.quick
            )
        result = {
            "benchmark": "evaluation",
            "backbone": arguments.backbone,
            "image_size": arguments.image_size,
            "epochs": config.epochs,
            "seeds": config.seeds,
            "views": config.views,
            "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "time": compare_times(backbone, arguments, config),
            "accuracy": compare_accuracies(backbone, store, run, config),
            "bars": {"seconds": BAR_SECONDS, "ratio": BAR_RATIO},
        }
    print(format_comparison(result))
    write_json(result, arguments.json)


if __name__ == "__main__":
    main()
