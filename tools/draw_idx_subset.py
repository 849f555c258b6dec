"""Write a balanced, seeded subset of a dataset of idx files; how the embedded dataset was made.

``python tools/draw_idx_subset.py /usr/share/datasets/fashion-mnist pipeline/data/fashion_mnist_6k``
"""

import gzip
import struct
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from sfm.pipeline.sources.idx import open_idx_source


def write_idx(path: Path, data: bytes, shape: tuple[int, ...]) -> None:
    """Write unsigned bytes of a shape as a gzip idx file; equal content gives equal bytes."""
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
    path.write_bytes(gzip.compress(header + data, compresslevel=9, mtime=0))


def draw_idx_subset(
    source: Annotated[str, typer.Argument(help="Folder of the full idx files.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    train: Annotated[int, typer.Option(help="Training images per class.")] = 500,
    test: Annotated[int, typer.Option(help="Held-out images per class.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
) -> None:
    """Draw images of every class at random and write them, shuffled, as four idx files."""
    full = open_idx_source(source)
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, split, per_class in (("train", full.train, train), ("t10k", full.test, test)):
        labels, class_ids = split.labels, full.class_ids
        assert labels is not None
        assert class_ids is not None
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(len(class_ids))]
        )
        positions = rng.permutation(len(rows))
        order = np.argsort(rows)
        images = [b""] * len(rows)
        for index, sample in zip(order, split.read(rows[order]), strict=True):
            images[positions[index]] = sample.data
        subset_labels = np.empty(len(rows), dtype=np.uint8)
        subset_labels[positions] = [int(class_ids[c]) for c in labels[rows]]
        height, width = full.decode(images[0]).size[::-1]
        write_idx(out / f"{name}-images-idx3-ubyte.gz", b"".join(images), (len(images), height, width))
        write_idx(out / f"{name}-labels-idx1-ubyte.gz", subset_labels.tobytes(), (len(subset_labels),))


if __name__ == "__main__":
    typer.run(draw_idx_subset)
