"""The dry run of an extraction: estimate its time and space from a few images."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.pipeline.batch_features import BatchFeatures, PassOptions, compute_batch_features
from sfm.pipeline.cost_model import estimate_statistics_operations, measure_statistics_operations_per_second
from sfm.pipeline.decoding import SampleBatch
from sfm.pipeline.entry_rows import list_entry_roles
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.file_counts import count_used_and_unused_files, make_bounded_file_counts
from sfm.pipeline.hold_out import count_held_out_per_class, open_extraction_source
from sfm.pipeline.partition_tasks import PartitionTask, make_tasks
from sfm.pipeline.runtime import (
    BATCH_IMAGES,
    count_cores,
    extraction_runtime,
    one_torch_thread,
    optimize_for_inference,
)
from sfm.pipeline.selection import SampleSelection, select_samples_if_labels_known
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample
from sfm.pipeline.task_results import IMAGE_MARKS
from sfm.stats_store.cards import FileCounts

PROBE_SHARE = 0.01
MIN_PROBE_IMAGES, MAX_PROBE_IMAGES = 96, 384
"""Images of the probe: a hundredth of all, within these bounds."""


@dataclass(frozen=True)
class BackboneEstimate:
    """A backbone of an estimate: spec, hash, input size in pixels, length of its features."""

    backbone: str
    backbone_hash: str
    image_size: int
    features: int


@dataclass(frozen=True)
class ExtractionEstimate:
    """Estimated size, time and result of an extraction; the attributes are the keys of ``--dry-run --json``.

    Attributes
    ----------
    classes : int or None
        None if the number is known only after the pass.
    samples : dict of str to int
        Images, by split.
    counted : bool
        False if the numbers are extrapolated from the first shard.
    partitions : int
    backbones : list of BackboneEstimate
    entries : int
        Entries to be published.
    probed, undecodable : int
        Images of the probe, and those among them that cannot be decoded.
    images_per_second : float
        Of the probe, with this process's cores and device.
    seconds : float
        Of the pass over the images.
    statistics_seconds : float or None
        Of the classifiers and sub-class centres of all entries, after the pass; for `classes_met` classes
        if their number is known only after the pass.
    staging_bytes, store_bytes : int
        Size of unfinished work, and of the entries before compression.
    files : dict
        ``found``, ``used`` and ``unused`` by kind; where images were not counted, `samples`, the files
        beside the shards, and those in the first shard of each split, times the number of shards.
    notes : tuple of str
        Choices that the source made.
    composited, dark : int
        Images of the probe that are not opaque, and that are suspiciously dark; see
        `sfm.backbones.rendering.RenderedImage`.
    classes_met : int
        Number of classes in the first shards, if images were not counted.
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


class SampleCountEstimate(NamedTuple):
    """Number of samples by split, and of the classes met while the samples of first shards were counted.

    Where labels are known, the numbers of samples are exact, and `classes_met` is 0.
    """

    samples_by_split: dict[str, int]
    classes_met: int


@dataclass(frozen=True)
class ProbeResult:
    """Speed and problems of decoding and computing a few images.

    Attributes
    ----------
    image_count, undecodable_count : int
    images_per_second : float
    image_mark_counts : dict of str to int
        By `sfm.pipeline.task_results.IMAGE_MARKS`.
    """

    image_count: int
    undecodable_count: int
    images_per_second: float
    image_mark_counts: dict[str, int]


def estimate_extraction(
    config: ExtractConfig, progress: ProgressCallback = no_progress
) -> ExtractionEstimate:
    """Open source and backbones, extract a few images, and estimate the whole; nothing is written.

    Raises
    ------
    InputError
        If dataset or backbone cannot be used.
    IncompleteExtractionError
        If a decoding process is lost.
    """
    source = open_extraction_source(config)
    selection = select_samples_if_labels_known(config, source)
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
    samples, classes_met = count_or_extrapolate_samples(source, selection, progress)
    total = sum(samples.values())
    files = estimate_file_counts_before_pass(source, selection, total)
    if config.hold_out is not None:
        samples = estimate_samples_by_split_after_hold_out(selection, samples, config.hold_out)
    progress(Progress("probe", 0, 1, "parts"))
    probe = time_probe_images(source, tasks, backbones, config, total)
    progress(Progress("probe", 1, 1, "parts", {"images/s": probe.images_per_second}))
    classes = None if source.class_ids is None else len(source.class_ids)
    if selection is not None:
        classes = len(selection.class_ids)
    estimates = [
        BackboneEstimate(b.card.spec, b.card.hash, b.card.preprocessing.input_size, b.card.features)
        for b in backbones
    ]
    features = sum(estimate.features for estimate in estimates)
    entry_bytes = [
        estimate_entry_bytes(config, e.features, e.image_size, classes or classes_met, samples)
        for e in estimates
    ]
    return ExtractionEstimate(
        **probe.image_mark_counts,
        source=source.spec,
        classes=classes,
        samples=samples,
        counted=selection is not None,
        partitions=len(tasks),
        backbones=estimates,
        entries=len(backbones) * len(list_entry_roles(config)),
        probed=probe.image_count,
        undecodable=probe.undecodable_count,
        images_per_second=probe.images_per_second,
        seconds=total / probe.images_per_second,
        staging_bytes=32 * total + 4 * features * (total + config.views * samples["train"]),
        store_bytes=len(list_entry_roles(config)) * sum(entry_bytes),
        files=files.model_dump(),
        notes=source.inventory.notes,
        statistics_seconds=estimate_statistics_seconds(
            config, backbones, classes or classes_met, samples["train"]
        ),
        classes_met=classes_met,
    )


def estimate_statistics_seconds(
    config: ExtractConfig, backbones: Sequence[Backbone], class_count: int | None, training_sample_count: int
) -> float | None:
    """Estimate the seconds that the statistics of all entries take after the pass, on this machine."""
    if not class_count:
        return None
    seconds = 0.0
    for backbone in backbones:
        features = backbone.card.features
        with limit_cpu_threads(config.threads):
            rate = measure_statistics_operations_per_second(class_count, features, backbone.device)
        for role in list_entry_roles(config):
            rows = (
                round(training_sample_count * (1 - (config.tune_fraction or 0.0)))
                if role == "tuning"
                else training_sample_count
            )
            cost = estimate_statistics_operations(
                class_count, features, rows, 1 + config.views, config.sub_classes, config.classifier
            )
            seconds += cost.total / rate
    return seconds


def count_or_extrapolate_samples(
    source: Source, selection: SampleSelection | None, progress: ProgressCallback
) -> SampleCountEstimate:
    """Return the number of samples by split, and the number of classes met while counting.

    If labels are not known, the count of the first shard is multiplied by the number of shards.
    """
    if selection is not None:
        return SampleCountEstimate(
            {name: len(selection.list_used_positions(name)) for name in source.splits}, classes_met=0
        )
    counts = {}
    classes: set[str] = set()
    for done, (name, split) in enumerate(source.splits.items()):
        progress(Progress("first shards", done, len(source.splits), "splits"))
        counts[name] = 0
        for sample in split.shards[0].read(None) if split.shards else ():
            counts[name] += len(split.shards)
            classes.add(sample.class_id)
    progress(Progress("first shards", len(counts), len(counts), "splits"))
    return SampleCountEstimate(counts, len(classes))


def estimate_samples_by_split_after_hold_out(
    selection: SampleSelection | None, sample_counts_by_split: dict[str, int], held_out_fraction: float
) -> dict[str, int]:
    """Return the number of samples by split once a share of the training split is held out."""
    held_out = round(held_out_fraction * sample_counts_by_split["train"])
    if selection is not None:
        labels = selection.labels_by_split["train"]
        held_out = int(count_held_out_per_class(np.bincount(labels[labels >= 0]), held_out_fraction).sum())
    return {"train": sample_counts_by_split["train"] - held_out, "test": held_out}


def estimate_file_counts_before_pass(
    source: Source, selection: SampleSelection | None, used_sample_count: int
) -> FileCounts:
    """Return the used and unused files of a source as far as they are known before the pass.

    Where labels are not known, the files in the first shard of a split are multiplied by the number of
    shards, as the samples are.
    """
    if selection is None or source.labels is None:
        unused = Counter(source.inventory.unused_by_kind)
        for split in source.splits.values():
            for kind, count in split.shards[0].unused_by_kind.items() if split.shards else ():
                unused[kind] += count * len(split.shards)
        return make_bounded_file_counts(used_sample_count, unused)
    none = {name: np.zeros(0, dtype=np.int64) for name in source.splits}
    return count_used_and_unused_files(
        source.class_ids or [], source.labels, selection, none, source.inventory.unused_by_kind
    )


def read_probe_samples(source: Source, tasks: Sequence[PartitionTask], max_samples: int) -> Iterator[Sample]:
    """Yield evenly spaced training samples of a source whose labels are known, or else its first samples."""
    rows_by_task = [
        task.positions_in_split
        for task in tasks
        if task.positions_in_split is not None and task.split == "train"
    ]
    if rows_by_task:
        rows = np.concatenate(rows_by_task)
        chosen = np.unique(np.linspace(0, len(rows) - 1, max_samples).astype(np.int64))
        yield from source.train.read(rows[chosen])
    else:
        streams = (task.iterate_samples(source) for task in tasks)
        yield from prefetch_samples(itertools.islice(itertools.chain.from_iterable(streams), max_samples))


def time_probe_images(
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones: Sequence[Backbone],
    config: ExtractConfig,
    dataset_image_count: int,
) -> ProbeResult:
    """Time decoding and features of a few images, computed as in the pass."""
    backbones = optimize_for_inference(backbones, config.precision, config.execution)
    device = backbones[0].device.type
    options = PassOptions(
        None, "skip", config.precision, config.views, config.seed, source.rendering, config.execution
    )
    max_samples = min(MAX_PROBE_IMAGES, max(MIN_PROBE_IMAGES, round(PROBE_SHARE * dataset_image_count)))
    samples = list(enumerate(read_probe_samples(source, tasks, max_samples)))
    with (
        one_torch_thread(),
        tf32_disabled(),
        extraction_runtime(source, device, config.threads or count_cores()) as runtime,
        ThreadPoolExecutor(runtime.max_batches_in_flight) as pool,
    ):
        size = min(BATCH_IMAGES[device], max(1, len(samples) // runtime.max_batches_in_flight))
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        # Not timed: a first batch of another size takes a GPU a second or more.
        last_batch = batches.pop() if len(batches) > 1 and len(batches[-1]) < size else []

        def compute_features(batch: SampleBatch) -> BatchFeatures:
            return compute_batch_features(batch, "train", runtime, backbones, options)

        # Warm up: the first batch of each thread and process takes longer.
        list(pool.map(compute_features, batches[: runtime.max_batches_in_flight]))
        began = time.perf_counter()
        results = list(pool.map(compute_features, batches))
        images_per_second = sum(map(len, batches)) / (time.perf_counter() - began)
        results += [compute_features(last_batch)] if last_batch else []
    return ProbeResult(
        len(samples),
        sum(len(result.skipped) for result in results),
        images_per_second,
        {
            mark: sum(len(result.image_mark_locations.get(mark, ())) for result in results)
            for mark in IMAGE_MARKS
        },
    )


def estimate_entry_bytes(
    config: ExtractConfig,
    feature_count: int,
    image_size: int,
    class_count: int,
    sample_counts_by_split: dict[str, int],
) -> int:
    """Return the size of an entry's arrays: features in two bytes, everything else as in the schema."""
    class_bytes = (
        feature_count * (8 + 8 + 4) + sum(k * (4 * feature_count + 8) for k in config.sub_classes) + 12
    )
    size = class_count * class_bytes + 8 * feature_count * feature_count
    size += 0 if config.no_held_out else sample_counts_by_split["test"] * (2 * feature_count + 4)
    size += sample_counts_by_split["train"] * (2 * feature_count + 4) if config.keep_train_features else 0
    return size + class_count * config.exemplars * (3 * image_size * image_size + 9)
