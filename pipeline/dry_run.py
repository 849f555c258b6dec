"""``sfm extract --dry-run``: what an extraction would do, with time and space estimated from a probe."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.cpu_threads import limit_threads
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.pipeline.cost_model import estimate_statistics_cost, measure_operations_per_second
from sfm.pipeline.decoding import SampleBatch
from sfm.pipeline.entry_rows import list_roles
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.features import BatchFeatures, PassOptions, compute_batch_features
from sfm.pipeline.file_counts import count_files, make_file_counts
from sfm.pipeline.hold_out import count_held_out, open_dataset
from sfm.pipeline.runtime import (
    BATCH_IMAGES,
    count_cores,
    extraction_runtime,
    one_torch_thread,
    optimize_for_inference,
)
from sfm.pipeline.selection import SampleSelection, select_by_listed_labels
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample
from sfm.pipeline.staging import IMAGE_MARKS, PartitionTask, make_tasks
from sfm.stats_store.cards import FileCounts

PROBE_SHARE = 0.01
MIN_PROBE_IMAGES, MAX_PROBE_IMAGES = 96, 384
"""Images that a probe looks at: a hundredth of all, but not fewer nor more than these."""


@dataclass(frozen=True)
class BackboneEstimate:
    """One backbone of a plan: its spec, its hash, its input size in pixels, the length of its feature."""

    backbone: str
    backbone_hash: str
    image_size: int
    features: int


@dataclass(frozen=True)
class ExtractionEstimate:
    """What an extraction would do.

    Attributes
    ----------
    classes : int or None
        None: only the pass tells.
    samples : dict of str to int
        Images, by split.
    counted : bool
        False where the numbers are those of one shard, times the number of shards.
    partitions : int
    backbones : list of Planned
    entries : int
        That would be published.
    probed, undecodable : int
        Images that the probe looked at, and those among them that cannot be decoded.
    images_per_second : float
        Of the probe, with this process's cores and device.
    seconds : float
        Of the pass over the images.
    statistics_seconds : float or None
        Of the classifiers and sub-class centres of all entries, after the pass; of `classes_met`
        where only the pass tells how many classes there are.
    staging_bytes, store_bytes : int
        Of unfinished work, and of the entries before compression.
    files : dict
        ``found``, ``used`` and ``unused`` by kind; where images were not counted, `samples`, what lies beside
        the shards, and what lies in the first of each split, times their number.
    notes : tuple of str
        What the source chose where there was a choice.
    composited, dark : int
        Images of the probe that are not opaque, and that are suspiciously dark; see
        `sfm.backbones.rendering.Rendered`.
    classes_met : int
        Classes in the first shards, where images were not counted.
    """

    source: str
    classes: int | None
    samples: dict[str, int]
    counted: bool
    partitions: int
    backbones: list[BackboneEstimate]
    entries: int
    probed: int
    undecodable: int
    images_per_second: float
    seconds: float
    staging_bytes: int
    store_bytes: int
    files: dict[str, Any]
    notes: tuple[str, ...] = ()
    composited: int = 0
    dark: int = 0
    statistics_seconds: float | None = None
    classes_met: int = 0


def estimate_extraction(
    config: ExtractConfig, progress: ProgressCallback = no_progress
) -> ExtractionEstimate:
    """Open source and backbones, look at a few images, and estimate; nothing is written.

    Raises
    ------
    InputError
        If dataset or backbone cannot be used.
    Unfinished
        If a process that decodes is lost.
    """
    source = open_dataset(config)
    selection = select_by_listed_labels(config, source)
    backbones = [
        load_backbone(
            spec,
            image_size=config.image_size,
            device=config.device,
            fold_norms=config.execution != "eager",
            progress=progress,
        )
        for spec in dict.fromkeys(config.backbone)
    ]
    tasks = make_tasks(source, selection)
    samples, met = count_samples(source, selection, progress)
    total = sum(samples.values())
    files = count_files_before_pass(source, selection, total)
    if config.hold_out is not None:
        samples = subtract_held_out(selection, samples, config.hold_out)
    progress(Progress("probe", 0, 1, "parts"))
    probed, undecodable, rate, marked = probe_images(source, tasks, backbones, config, total)
    progress(Progress("probe", 1, 1, "parts", {"images/s": rate}))
    classes = None if source.class_ids is None else len(source.class_ids)
    if selection is not None:
        classes = len(selection.class_ids)
    widths = [backbone.card.features for backbone in backbones]
    sizes = [backbone.card.preprocessing.input_size for backbone in backbones]
    return ExtractionEstimate(
        **marked,
        source=source.spec,
        classes=classes,
        samples=samples,
        counted=selection is not None,
        partitions=len(tasks),
        backbones=[
            BackboneEstimate(b.card.spec, b.card.hash, s, b.card.features)
            for b, s in zip(backbones, sizes, strict=True)
        ],
        entries=len(backbones) * len(list_roles(config)),
        probed=probed,
        undecodable=undecodable,
        images_per_second=rate,
        seconds=total / rate,
        staging_bytes=32 * total + 4 * sum(widths) * (total + config.views * samples["train"]),
        store_bytes=len(list_roles(config))
        * sum(
            estimate_entry_bytes(config, w, s, classes or met, samples)
            for w, s in zip(widths, sizes, strict=True)
        ),
        files=files.model_dump(),
        notes=source.inventory.notes,
        statistics_seconds=estimate_statistics_seconds(config, backbones, classes or met, samples["train"]),
        classes_met=met,
    )


def estimate_statistics_seconds(
    config: ExtractConfig, backbones: Sequence[Backbone], classes: int | None, samples: int
) -> float | None:
    """Estimate the seconds that the statistics of all entries take after the pass, on this machine."""
    if not classes:
        return None
    seconds = 0.0
    for backbone in backbones:
        features = backbone.card.features
        with limit_threads(config.threads):
            rate = measure_operations_per_second(classes, features, backbone.device)
        for role in list_roles(config):
            rows = round(samples * (1 - (config.tune_fraction or 0.0))) if role == "tuning" else samples
            effort = estimate_statistics_cost(classes, features, rows, 1 + config.views, config.sub_classes)
            seconds += effort.total / rate
    return seconds


def count_samples(
    source: Source, selection: SampleSelection | None, progress: ProgressCallback
) -> tuple[dict[str, int], int]:
    """Return the number of samples by split, and of the classes met while counting.

    Of streams, the samples of the first shard are counted, times the number of shards.
    """
    if selection is not None:
        return {name: len(selection.rows(name)) for name in source.splits}, 0
    found = {}
    met: set[str] = set()
    for done, (name, split) in enumerate(source.splits.items()):
        progress(Progress("first shards", done, len(source.splits), "splits"))
        found[name] = 0
        for sample in split.shards[0].read(None) if split.shards else ():
            found[name] += len(split.shards)
            met.add(sample.label)
    progress(Progress("first shards", len(found), len(found), "splits"))
    return found, len(met)


def subtract_held_out(
    selection: SampleSelection | None, samples: dict[str, int], fraction: float
) -> dict[str, int]:
    """Return the samples by split once a share of the training split is held out."""
    held = round(fraction * samples["train"])
    if selection is not None:
        labels = selection.labels["train"]
        held = int(count_held_out(np.bincount(labels[labels >= 0]), fraction).sum())
    return {"train": samples["train"] - held, "test": held}


def count_files_before_pass(source: Source, selection: SampleSelection | None, samples: int) -> FileCounts:
    """Return what is known of the files of a source before the pass, once its samples were counted.

    What lies in the first shard of a split is taken for what lies in each, as the samples are.
    """
    if selection is None or source.labels is None:
        unused = Counter(source.inventory.unused)
        for split in source.splits.values():
            for kind, count in split.shards[0].unused.items() if split.shards else ():
                unused[kind] += count * len(split.shards)
        return make_file_counts(samples, unused)
    none = {name: np.zeros(0, dtype=np.int64) for name in source.splits}
    return count_files(source.class_ids or [], source.labels, selection, none, source.inventory.unused)


def read_probe_samples(source: Source, tasks: Sequence[PartitionTask], most: int) -> Iterator[Sample]:
    """Yield samples from all over a source whose labels are known; from the beginning of others."""
    known = [task.rows for task in tasks if task.rows is not None and task.split == "train"]
    if known:
        rows = np.concatenate(known)
        yield from source.train.read(rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(np.int64))])
    else:
        streams = (task.listed(source) for task in tasks)
        yield from prefetch_samples(itertools.islice(itertools.chain.from_iterable(streams), most))


def probe_images(
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones: Sequence[Backbone],
    config: ExtractConfig,
    total: int,
) -> tuple[int, int, float, dict[str, int]]:
    """Look at a few images as the pass does.

    Returns
    -------
    int, int, float, dict of str to int
        Images looked at, those that cannot be decoded, the rest per second, and how many have each mark.
    """
    backbones = optimize_for_inference(backbones, config.precision, config.execution)
    device = backbones[0].device.type
    rules = PassOptions(
        None, "skip", config.precision, config.views, config.seed, source.rendering, config.execution
    )
    samples = list(
        enumerate(
            read_probe_samples(
                source, tasks, min(MAX_PROBE_IMAGES, max(MIN_PROBE_IMAGES, round(PROBE_SHARE * total)))
            )
        )
    )
    with (
        one_torch_thread(),
        tf32_disabled(),
        extraction_runtime(source, device, config.threads or count_cores()) as equipment,
        ThreadPoolExecutor(equipment.threads) as pool,
    ):
        size = min(BATCH_IMAGES[device], max(1, len(samples) // equipment.threads))
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        # Not timed: of another size, it would be a first of its kind, which takes a GPU a second or more.
        last = batches.pop() if len(batches) > 1 and len(batches[-1]) < size else []

        def see(batch: SampleBatch) -> BatchFeatures:
            return compute_batch_features(batch, "train", equipment, backbones, rules)

        # What is done for the first time, by each thread and process, takes longer.
        list(pool.map(see, batches[: equipment.threads]))
        began = time.perf_counter()
        seen = list(pool.map(see, batches))
        rate = sum(map(len, batches)) / (time.perf_counter() - began)
        seen += [see(last)] if last else []
    undecodable = sum(len(each.skipped) for each in seen)
    marked = {mark: sum(len(each.marked.get(mark, ())) for each in seen) for mark in IMAGE_MARKS}
    return len(samples), undecodable, rate, marked


def estimate_entry_bytes(
    config: ExtractConfig, width: int, size: int, classes: int, samples: dict[str, int]
) -> int:
    """Return the size of an entry's arrays: features in two bytes, all else as the schema says."""
    per_class = width * (8 + 8 + 4) + sum(k * (4 * width + 8) for k in config.sub_classes) + 12
    found = classes * per_class + 8 * width * width
    found += 0 if config.no_held_out else samples["test"] * (2 * width + 4)
    found += samples["train"] * (2 * width + 4) if config.keep_train_features else 0
    return found + classes * config.exemplars * (3 * size * size + 9)
