"""Class means by the loop that research code has, to compare extraction with."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measurement import read_process_bytes
from throughput.component_rates import PLAIN_BATCH, run_extraction_pass
from throughput.image_folders import N_CLASSES

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.runtime import count_cores, extraction_runtime
from sfm.pipeline.sources import Source, open_source


def compute_means_in_plain_loop(source: Source, backbone: Backbone) -> np.ndarray:
    """Compute class means as research code does: load a class, then forward it in batches."""
    means = []
    for c in range(N_CLASSES):
        rows = np.flatnonzero(source.train.labels == c)
        images = torch.stack(
            [
                pixels_to_tensor(
                    resize_and_crop_image(source.decode(sample.data), backbone.card.preprocessing)[None]
                )[0]
                for sample in source.train.read(rows)
            ]
        )
        with torch.inference_mode():
            chunks = [
                backbone.features(chunk.to(backbone.device)).cpu() for chunk in images.split(PLAIN_BATCH)
            ]
        means.append(torch.cat(chunks).double().mean(dim=0))
    return torch.stack(means).numpy()


def compute_means_by_extraction(source: Source, backbone: Backbone) -> np.ndarray:
    """Compute class means as `sfm extract` does."""
    with (
        tempfile.TemporaryDirectory() as folder,
        extraction_runtime(source, backbone.device.type, count_cores()) as runtime,
    ):
        _, gathered, staging = run_extraction_pass(source, [backbone], Path(folder), runtime)
        train = [p for p in gathered.partitions if p.split == "train"]
        return accumulate_moments(
            staging.open_features(backbone.card.hash, train), N_CLASSES, backbone.card.features
        ).mean


def measure_method(method: str, spec: str, size: int, device: str) -> dict[str, float]:
    """Return images/s and peak memory of "plain" or "sfm" in this process."""
    backbone = load_backbone("lite0", image_size=size, device=device)
    source = open_source(spec)
    images = len(source.train.labels) + (len(source.test.labels) if method == "sfm" else 0)
    compute_means = compute_means_by_extraction if method == "sfm" else compute_means_in_plain_loop
    start = time.perf_counter()
    means = compute_means(source, backbone)
    seconds = time.perf_counter() - start
    return {
        "rate": images / seconds,
        "peak_bytes": read_process_bytes("VmHWM"),
        "mean": float(np.abs(means).mean()),
    }
