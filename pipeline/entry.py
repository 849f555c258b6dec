"""Staged features of one backbone become one entry of the store."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from sfm.backbones.build import Backbone
from sfm.events import ProgressCallback
from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.cost_model import (
    StatisticsProgress,
    count_centres_operations,
    count_pass_operations,
    estimate_statistics_cost,
    report_blocks,
)
from sfm.pipeline.entry_rows import EntryRows, PassResult, make_entry_options, read_digests
from sfm.pipeline.exemplars import choose_exemplars, read_exemplar_images
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.features import PassOptions, PassSummary
from sfm.pipeline.linear_classifier import LinearClassifier, measure_accuracies, train_classifier
from sfm.pipeline.pixel_marks import make_rendering_options
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import StagedFeatures, Staging
from sfm.pipeline.sub_class_centres import compute_sub_class_centres
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard
from sfm.stats_store.moments import Moments
from sfm.stats_store.publish import Draft, Published, publish
from sfm.stats_store.store import Store
from sfm.text import escape_non_utf8

MAX_SKIPPED_BYTES = 2**22
"""Of what an entry says about samples that were skipped."""

MAX_FLOAT16_VALUE = 6e4
MAX_FLOAT16_SHIFT = 0.001


@dataclass(frozen=True)
class EntryContext:
    """What all entries of one extraction share.

    Attributes
    ----------
    listing : str
        Digest of the source's listing.
    device : str
        Kind of the device that the backbones ran on.
    features : Pass
        What the pass over the images cost.
    gathered : Gathered
        What it found.
    flow_cosines : dict of str to (float or None)
        What the precision does to the flows, by backbone hash; empty for float32.
    """

    config: ExtractConfig
    source: Source
    store: Store
    staging: Staging
    listing: str
    device: str
    features: PassSummary
    gathered: PassResult
    flow_cosines: dict[str, float | None]


@dataclass(frozen=True)
class EntryStatistics:
    """What the features of one backbone say about a dataset.

    Attributes
    ----------
    centres : dict of int to (centre, count)
        Sub-class centres, per number of sub-classes.
    top1, top5 : float or None
        Accuracy of the classifier on the held-out features, as fractions.
    seconds : float
        Wall time of computing them.
    """

    moments: Moments
    classifier: LinearClassifier
    centres: dict[int, tuple[Any, Any]]
    top1: float | None
    top5: float | None
    seconds: float


def publish_entry(
    job: EntryContext, backbone: Backbone, part: EntryRows, progress: ProgressCallback
) -> Published:
    """Compute the statistics of one entry, write them as a run, and commit it; all or nothing."""
    train = part.staged_train(job.staging, backbone.card.hash)
    test = part.staged_test(job.staging, backbone.card.hash)
    statistics = compute_statistics(job, backbone, part, train, test, progress)
    draft = Draft(job.store)
    try:
        write_statistics(draft, statistics)
        if not job.config.no_held_out:
            write_features(draft, "test", test, statistics.classifier)
        if job.config.keep_train_features:
            write_features(draft, "train", train, statistics.classifier)
        if job.config.exemplars:
            write_exemplars(draft, job, backbone, part, train, statistics.moments)
        return publish(
            draft,
            backbone.card,
            make_dataset_card(job, part, len(train.all_labels()), len(test.all_labels())),
            make_extraction_card(job, part, backbone, statistics),
            make_classifier_card(statistics),
            replace=job.config.replace,
        )
    except BaseException:
        draft.discard()
        raise


def compute_statistics(
    job: EntryContext,
    backbone: Backbone,
    part: EntryRows,
    train: StagedFeatures,
    test: StagedFeatures,
    progress: ProgressCallback,
) -> EntryStatistics:
    """Stream staged features through moments, classifier, held-out accuracy and sub-class centres."""
    began = time.perf_counter()
    classes, features = len(job.gathered.selection.class_ids), backbone.card.features
    labels, numbers = train.all_labels(), job.config.sub_classes
    kinds = PassOptions(views=job.config.views, seed=job.config.seed).kinds(backbone.card.hash, "train")
    views = [part.staged_train(job.staging, kind) for kind in kinds[1:]]
    stage = f"{'tuning ' if part.role == 'tuning' else ''}statistics of {backbone.card.spec}"
    effort = estimate_statistics_cost(classes, features, len(labels), len(kinds), numbers)
    meter = StatisticsProgress(progress, stage, effort)
    meter.tell()

    def on_pass(rows: int) -> None:
        meter.advance(count_pass_operations(rows, features, classes), effort.classifier)

    def on_placed(rows: int, k: int) -> None:
        meter.advance(count_centres_operations(rows, features, k), effort.total)

    moments = accumulate_moments(report_blocks(train, meter, features, effort.moments), classes, features)
    meter.reach(effort.moments)
    classifier = train_classifier(train, moments, backbone.device, views, on_pass=on_pass)
    top1, top5 = measure_accuracies(test, classifier)
    meter.reach(effort.classifier)
    centres = compute_sub_class_centres(train, labels, classes, features, numbers, job.config.seed, on_placed)
    meter.finish(**({} if top1 is None else {"top-1 %": 100 * top1}))
    return EntryStatistics(moments, classifier, centres, top1, top5, time.perf_counter() - began)


def write_statistics(draft: Draft, statistics: EntryStatistics) -> None:
    """Write the arrays that are not over samples."""
    draft.write("train/count", statistics.moments.count)
    draft.write("train/mean", statistics.moments.mean)
    draft.write("train/scatter_diagonal", statistics.moments.scatter_diagonal)
    draft.write("train/within_scatter", statistics.moments.within_scatter)
    for k, (centre, count) in statistics.centres.items():
        draft.write(f"train/centre_{k}", centre)
        draft.write(f"train/centre_count_{k}", count)
    draft.write("classifier/weight", statistics.classifier.weight)
    draft.write("classifier/bias", statistics.classifier.bias)


def write_features(draft: Draft, split: str, rows: StagedFeatures, classifier: LinearClassifier) -> None:
    """Write features and labels of a split."""
    labels, dtype = rows.all_labels(), choose_feature_dtype(rows, classifier)
    shape = (len(labels), classifier.weight.shape[1])
    draft.write_blocks(f"{split}/feature", rows.blocks(dtype), shape, dtype)
    draft.write(f"{split}/label", labels)


def choose_feature_dtype(rows: StagedFeatures, classifier: LinearClassifier) -> np.dtype[Any]:
    """Return float16 where it loses nothing that matters, else float32.

    That is: every value is finite and below 6e4, and the classifier's top-1 moves by at most 0.1 points.
    """
    if not all(np.abs(features).max() < MAX_FLOAT16_VALUE for features, _ in rows):
        return np.dtype(np.float32)
    rounded = ((features.astype(np.float16).astype(np.float32), labels) for features, labels in rows)
    before, after = measure_accuracies(rows, classifier)[0], measure_accuracies(rounded, classifier)[0]
    shift = abs((after or 0.0) - (before or 0.0))
    return np.dtype(np.float16 if shift <= MAX_FLOAT16_SHIFT else np.float32)


def write_exemplars(
    draft: Draft,
    job: EntryContext,
    backbone: Backbone,
    part: EntryRows,
    train: StagedFeatures,
    moments: Moments,
) -> None:
    """Choose, read and write the arrays under ``exemplar/``."""
    labels = train.all_labels()
    choice = choose_exemplars(train, labels, moments.mean, job.config.exemplars, job.config.seed)
    place = np.flatnonzero(part.train_rows)[choice.sample]
    sample = np.where(choice.sample < 0, -1, np.concatenate([p.samples for p in part.train])[place])
    digests = read_digests(job.staging, part.train, place)
    sizes = job.gathered.sizes["train"]
    images = read_exemplar_images(job.source, sample, digests, sizes, backbone.card.preprocessing)
    draft.write("exemplar/image", images)
    draft.write("exemplar/role", choice.role)
    draft.write("exemplar/sample", sample)


def make_dataset_card(job: EntryContext, part: EntryRows, train: int, test: int) -> DatasetCard:
    """Say which images the entry is of."""
    return DatasetCard(
        name=job.config.name or job.source.name,
        class_ids=job.gathered.selection.class_ids,
        class_names=job.gathered.selection.class_names,
        train_samples=train,
        test_samples=test,
        fingerprint=part.fingerprint,
        leaves=[part.fingerprint],
        licence=job.config.licence or job.source.licence,
        source=escape_non_utf8(job.source.spec),
    )


def make_extraction_card(
    job: EntryContext, part: EntryRows, backbone: Backbone, statistics: EntryStatistics
) -> ExtractionCard:
    """Say how the entry was computed."""
    packages = ("sfm-distill", "torch", "timm", "pillow", "numpy", "zarr")
    return ExtractionCard(
        options=make_entry_options(
            job.config,
            part.role,
            make_rendering_options(job.source.rendering, composited=part.marked["composited"].count > 0),
        ),
        role=part.role,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        device=job.device,
        threads=torch.get_num_threads(),
        seconds=job.features.seconds,
        statistics_seconds=statistics.seconds,
        images_per_second=job.features.images_per_second,
        listing=job.listing,
        skipped=truncate_skipped(job.gathered.skipped),
        train_bytes=part.train_bytes,
        flow_cosine=job.flow_cosines.get(backbone.card.hash),
        composited=part.marked["composited"].count,
        composited_example=part.marked["composited"].example,
        dark=part.marked["dark"].count,
        dark_example=part.marked["dark"].example,
        files=job.gathered.files,
    )


def truncate_skipped(skipped: Sequence[str]) -> list[str]:
    """Return the samples that were skipped, or the first of them where a card cannot hold them all."""
    sizes = np.cumsum([len(json.dumps(line)) for line in skipped])
    told = int(np.searchsorted(sizes, MAX_SKIPPED_BYTES, side="right"))
    return [*skipped[:told], *([f"{len(skipped) - told:,} others"] if told < len(skipped) else [])]


def make_classifier_card(statistics: EntryStatistics) -> ClassifierCard:
    """Say how the classifier was trained and how good it is."""
    return ClassifierCard(
        solver=statistics.classifier.solver,
        l2=statistics.classifier.l2,
        iterations=statistics.classifier.iterations,
        converged=statistics.classifier.converged,
        held_out_top1=statistics.top1,
        held_out_top5=statistics.top5,
    )
