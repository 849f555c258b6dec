"""Datasets of the extraction benchmark: Fashion-MNIST as it is, as small PNG and as large JPEG files."""

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.sources.class_subsets import select_split_rows

N_CLASSES = 10
N_UNIQUE_IMAGES = 400
"""Number of distinct images in a folder; the rest are hard links to them."""


def make_image_source(root: Path, kind: str, count: int) -> str:
    """Write `count` training images and a few held-out ones, and return the spec of the source.

    Nothing is written for kind "embedded": the package holds 5,000 and 1,000 images.
    """
    if kind == "embedded":
        return "builtin:fashion-mnist-6k"
    source = open_source("builtin:fashion-mnist-6k")
    rng = np.random.default_rng(0)
    folder = root / f"{kind}-{count}"
    for split, images in (("train", count), ("test", 2 * N_CLASSES)):
        unique = min(images, N_UNIQUE_IMAGES)
        for i, sample in enumerate(source.splits[split].read(np.arange(unique))):
            suffix = "png" if kind == "tiny" else "jpg"
            file = folder / split / f"class-{i % N_CLASSES}" / f"{i:06d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_image(source.decode(sample.data), kind, rng))
            for j in range(i + unique, images, unique):
                os.link(file, file.with_name(f"{j:06d}{file.suffix}"))
    return f"folder:{folder}"


def encode_image(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """Return the contents of an image file: a PNG for kind "tiny", or an enlarged, noisy JPEG."""
    out = io.BytesIO()
    if kind == "tiny":
        image.save(out, "PNG")
    else:
        large = np.asarray(image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC))
        noisy = large + 12 * rng.standard_normal(large.shape, dtype=np.float32)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def take_subset(source: Source, count: int) -> Source:
    """Return a source of `count` training images, evenly spaced and thus of all classes."""
    labels = source.train.labels
    rows = np.unique(np.linspace(0, len(labels) - 1, count).astype(np.int64))
    return replace(
        source, train=select_split_rows(source.train, rows, labels[rows], f"{count} of {source.spec}")
    )
