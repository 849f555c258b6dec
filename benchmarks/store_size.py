"""Size of an entry's arrays in the store, and write and read speed, by codec and chunk size.

The features are real: Fashion-MNIST through lite0 and lite1, side by side, cut to D columns. Pooled
convolutional features are never negative and often near zero; those of transformers are dense and signed, so
everything is measured again after a random rotation. Classes beyond the ten that there are have fifty random
images of one of them each. Of large arrays the first 32 MiB are encoded. Every array is read back and
compared: what is not lossless fails.

    python benchmarks/store_size.py --quick
    python benchmarks/store_size.py --json store_size.json
"""

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec
from zarr.storage import MemoryStore

from sfm.backbones.build import load_backbone
from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import stage_tasks
from sfm.pipeline.partition_tasks import make_tasks
from sfm.pipeline.runtime import count_cores, extraction_runtime
from sfm.pipeline.selection import select_samples_if_labels_known
from sfm.pipeline.sources import open_source
from sfm.pipeline.staging import Staging
from sfm.stats_store.schema import MAX_CHUNK_BYTES

STORE_CODEC = "blosc zstd 5, shuffle"
CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "zstd 1": {"compressors": [ZstdCodec(level=1)]},
    "zstd 5": {"compressors": [ZstdCodec(level=5)]},
    "gzip 5": {"compressors": [GzipCodec(level=5)]},
    "blosc lz4 5, bitshuffle": {"compressors": [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")]},
    "blosc zstd 1, bitshuffle": {"compressors": [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")]},
    "blosc zstd 5, bitshuffle": {"compressors": [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")]},
    "blosc zstd 3, shuffle": {"compressors": [BloscCodec(cname="zstd", clevel=3, shuffle="shuffle")]},
    STORE_CODEC: {"compressors": [BloscCodec(cname="zstd", clevel=5, shuffle="shuffle")]},
    "pcodec 8": {"serializer": PCodec(level=8, mode_spec="auto")},
}
BARE = "all but pcodec are read by bare zarr-python"
MAX_ENCODED_BYTES = 32 * 2**20
SAMPLES_PER_CLASS = 50
MIB = 2**20


@dataclass(frozen=True)
class EncodingRow:
    """Figures of one array in one encoding.

    Attributes
    ----------
    features : {"pooled", "rotated"}
    ratio : float
        Bytes of the array per byte stored.
    entry_bytes, entry_stored : int
        Of the whole array, the latter at the ratio measured on its beginning.
    write, read : float
        MiB of the array per second.
    objects : int
        Chunks, or shards, of the whole array.
    """

    features: str
    classes: int
    width: int
    array: str
    dtype: str
    codec: str
    chunk_bytes: int
    shard_bytes: int | None
    ratio: float
    entry_bytes: int
    entry_stored: int
    write: float
    read: float
    objects: int


def load_wide_features(cache: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 features of 5,000 real images through lite0 and lite1, side by side, and the labels.

    Those in a store may have been rounded to float16, which would make everything look smaller.
    """
    if cache and cache.exists():
        with np.load(cache) as saved:
            return saved["features"], saved["labels"]
    source = open_source("builtin:fashion-mnist-6k")
    tasks = make_tasks(
        source,
        select_samples_if_labels_known(
            ExtractConfig(source=source.spec, store="", backbone=["lite0"]), source
        ),
    )
    train = [task for task in tasks if task.split == "train"]
    backbones = [load_backbone(spec, image_size=96) for spec in ("lite0", "lite1")]
    with tempfile.TemporaryDirectory() as folder:
        staging = Staging(Path(folder))
        with extraction_runtime(source, "cpu", count_cores()) as runtime:
            list(stage_tasks(source, train, backbones, staging, PassOptions(), runtime))
        columns = [
            np.concatenate([np.load(staging.array_path(backbone.card.hash, task)) for task in train])
            for backbone in backbones
        ]
    features, labels = np.concatenate(columns, axis=1), source.train.labels
    if cache:
        np.savez(cache, features=features, labels=labels)
    return features, labels


def rotate_features(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate the features into a random orthonormal basis, which makes them dense and signed."""
    basis, _ = np.linalg.qr(rng.standard_normal((features.shape[1], features.shape[1])))
    return ((features - features.mean(axis=0)) @ basis.astype(np.float32)).astype(np.float32)


def iter_entry_arrays(
    features: np.ndarray, labels: np.ndarray, classes: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield the arrays of an entry: name, first rows, and number of rows."""
    width = features.shape[1]
    rows = max(1, MAX_ENCODED_BYTES // (8 * width))
    by_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    stored_classes = min(classes, rows)
    chosen = np.stack(
        [rng.choice(by_label[c % len(by_label)], SAMPLES_PER_CLASS) for c in range(stored_classes)]
    )
    mean, scatter = np.empty((stored_classes, width)), np.empty((stored_classes, width))
    for c, own in enumerate(chosen):
        samples = features[own].astype(np.float64)
        mean[c] = samples.mean(axis=0)
        scatter[c] = np.square(samples - mean[c]).sum(axis=0)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    within = centred.T @ centred
    ridge = np.trace(within) / width * 0.01 * np.eye(width)
    # In C order: numcodecs' PCodec loses the order of an array that is not.
    weight = np.ascontiguousarray(np.linalg.solve(within + ridge, (mean - features.mean(axis=0)).T).T)
    yield "train/mean", mean, classes
    yield "train/scatter_diagonal", scatter, classes
    yield "train/within_scatter", within, width
    groups = rng.choice(len(features), (max(1, stored_classes // 5), 5, 3))
    centres = features[groups].mean(axis=2)
    yield "train/centre_5", centres, classes
    yield "classifier/weight", weight.astype(np.float32), classes
    yield "test/feature", features.astype(np.float16), len(features)
    yield "test/feature", features, len(features)


def measure_encoding(
    name: str, array: np.ndarray, rows: int, codec: str, chunk_bytes: int, shard_bytes: int | None
) -> dict[str, Any]:
    """Write an array to memory and read it back; exit if its values changed."""
    row_bytes = array[:1].nbytes
    step = min(len(array), max(1, chunk_bytes // row_bytes))
    shard = None
    if shard_bytes:
        shard = min(step * max(1, shard_bytes // (step * row_bytes)), step * math.ceil(len(array) / step))
    options = dict(CODECS[codec])
    options["compressors"] = [*options.get("compressors", []), Crc32cCodec()]
    memory: dict[str, Any] = {}
    target = zarr.create_array(
        MemoryStore(memory),
        shape=array.shape,
        dtype=array.dtype,
        chunks=(step, *array.shape[1:]),
        shards=None if shard is None else (shard, *array.shape[1:]),
        config={"write_empty_chunks": True},
        **options,
    )
    started = time.perf_counter()
    target[...] = array
    written = time.perf_counter()
    decoded = target[...]
    done = time.perf_counter()
    if not np.array_equal(decoded, array):
        raise SystemExit(f"{codec} changed {name}")
    stored = sum(len(data) for path, data in memory.items() if not path.endswith("zarr.json"))
    ratio = array.nbytes / stored
    n_rows = rows * row_bytes
    return {
        "array": name,
        "dtype": str(array.dtype),
        "codec": codec,
        "chunk_bytes": chunk_bytes,
        "shard_bytes": shard_bytes,
        "ratio": ratio,
        "entry_bytes": n_rows,
        "entry_stored": round(n_rows / ratio),
        "write": array.nbytes / MIB / (written - started),
        "read": array.nbytes / MIB / (done - written),
        "objects": math.ceil(rows / (shard or step)),
    }


def measure_all_encodings(arguments: argparse.Namespace) -> list[EncodingRow]:
    """Measure every array with every codec, and with the store's codec in every chunk size."""
    rng = np.random.default_rng(0)
    pooled, labels = load_wide_features(arguments.features)
    kinds = {"pooled": pooled, "rotated": rotate_features(pooled, rng)}
    cases = [(10, 384), (1000, 768)] if arguments.quick else CASES
    plans = [(codec, MAX_CHUNK_BYTES, None) for codec in CODECS]
    plans += [(STORE_CODEC, size * MIB // 4, None) for size in (1, 4, 64)]
    plans += [(STORE_CODEC, MIB, 16 * MIB)]
    measure_encoding("warm-up", pooled[:512], 512, STORE_CODEC, MAX_CHUNK_BYTES, None)
    rows = []
    for classes, width in cases:
        for kind, features in kinds.items():
            for name, array, n_rows in iter_entry_arrays(features[:, :width].copy(), labels, classes, rng):
                for codec, chunk, shard in plans:
                    figures = measure_encoding(name, array, n_rows, codec, chunk, shard)
                    rows.append(EncodingRow(features=kind, classes=classes, width=width, **figures))
    return rows


CASES = [(10, 384), (10, 1536), (1000, 768), (21000, 384), (21000, 1536)]


def format_encoding(row: EncodingRow) -> str:
    """Return the codec and the chunk size as text."""
    size = f"{row.chunk_bytes / MIB:g} MiB chunks"
    return f"{row.codec}, {size}" + (f" in {row.shard_bytes // MIB} MiB shards" if row.shard_bytes else "")


def print_encoding_table(title: str, groups: dict[str, list[EncodingRow]]) -> None:
    """Print a line per group: bytes and speeds of all its arrays."""
    print(f"\n{title}\n{'':52} stored  ratio  write MiB/s  read MiB/s  objects")
    for name, rows in groups.items():
        n_rows, stored = sum(r.entry_bytes for r in rows), sum(r.entry_stored for r in rows)
        write = n_rows / MIB / sum(r.entry_bytes / MIB / r.write for r in rows)
        read = n_rows / MIB / sum(r.entry_bytes / MIB / r.read for r in rows)
        objects = sum(r.objects for r in rows)
        print(f"{name:50} {stored / MIB:7.1f}M {n_rows / stored:6.3f} {write:12.0f} {read:11.0f} {objects:8}")


def group_rows(rows: list[EncodingRow], *names: str) -> dict[str, list[EncodingRow]]:
    """Group rows by their encoding, or by the values of fields."""
    figures: dict[str, list[EncodingRow]] = {}
    for row in rows:
        key = ", ".join(f"{getattr(row, name)}" for name in names) if names else format_encoding(row)
        figures.setdefault(key, []).append(row)
    return figures


def main() -> None:
    """Run the benchmark from the command line."""
    configure_malloc_to_keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--features", type=Path, help=".npz file to keep the features in between runs")
    parser.add_argument("--quick", action="store_true", help="two small cases only")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    arguments = parser.parse_args()
    rows = measure_all_encodings(arguments)
    for kind in ("pooled", "rotated"):
        own = [row for row in rows if row.features == kind]
        plain = [row for row in own if row.chunk_bytes == MAX_CHUNK_BYTES and row.shard_bytes is None]
        current = [row for row in plain if row.codec == STORE_CODEC]
        print_encoding_table(f"{kind} features, all cases and arrays, by codec ({BARE})", group_rows(plain))
        print_encoding_table(
            f"{kind} features, by chunk size", group_rows([row for row in own if row.codec == STORE_CODEC])
        )
        print_encoding_table(
            f"{kind} features, {STORE_CODEC}, by case (classes, width)",
            group_rows(current, "classes", "width"),
        )
        print_encoding_table(
            f"{kind} features, {STORE_CODEC}, by array", group_rows(current, "array", "dtype")
        )
    if arguments.json:
        record = {
            "benchmark": "store_size",
            "cpu": platform.processor() or platform.machine(),
            "versions": {p: version(p) for p in ("zarr", "numcodecs", "pcodec", "numpy")},
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(record, indent=1))
        print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    numcodecs.blosc.set_nthreads(1)
    main()
