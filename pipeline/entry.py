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
from sfm.pipeline.centres import sub_class_centres
from sfm.pipeline.classifier import Classifier, accuracies, train_classifier
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.effort import (
    Meter,
    estimate_effort,
    operations_of_centres,
    operations_of_pass,
    watch_blocks,
)
from sfm.pipeline.exemplars import choose_exemplars, exemplar_images
from sfm.pipeline.features import Pass, Rules
from sfm.pipeline.moments import Moments, accumulate
from sfm.pipeline.parts import Gathered, Part, digests_at, options_of
from sfm.pipeline.pixels import rendering_options
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import Staged, Staging
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard
from sfm.stats_store.publication import Draft, PublishResult, publish_draft
from sfm.stats_store.store import Store
from sfm.text import utf8_only

SKIPPED_BYTES = 2**22
"""Of what an entry says about samples that were skipped."""

FLOAT16_LIMIT = 6e4
FLOAT16_SHIFT = 0.001


@dataclass(frozen=True)
class Job:
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
    features: Pass
    gathered: Gathered
    flow_cosines: dict[str, float | None]


@dataclass(frozen=True)
class Statistics:
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
    classifier: Classifier
    centres: dict[int, tuple[Any, Any]]
    top1: float | None
    top5: float | None
    seconds: float


def publish_entry(job: Job, backbone: Backbone, part: Part, progress: ProgressCallback) -> PublishResult:
    """Compute the statistics of one entry, write them as a run, and commit it; all or nothing."""
    train = part.staged_train(job.staging, backbone.card.hash)
    test = part.staged_test(job.staging, backbone.card.hash)
    statistics = compute(job, backbone, part, train, test, progress)
    draft = Draft(job.store)
    try:
        write_statistics(draft, statistics)
        if not job.config.no_held_out:
            write_features(draft, "test", test, statistics.classifier)
        if job.config.keep_train_features:
            write_features(draft, "train", train, statistics.classifier)
        if job.config.exemplars:
            write_exemplars(draft, job, backbone, part, train, statistics.moments)
        return publish_draft(
            draft,
            backbone.card,
            dataset_card(job, part, len(train.all_labels()), len(test.all_labels())),
            extraction_card(job, part, backbone, statistics),
            classifier_card(statistics),
            replace=job.config.replace,
        )
    except BaseException:
        draft.discard()
        raise


def compute(
    job: Job, backbone: Backbone, part: Part, train: Staged, test: Staged, progress: ProgressCallback
) -> Statistics:
    """Stream staged features through moments, classifier, held-out accuracy and sub-class centres."""
    began = time.perf_counter()
    classes, features = len(job.gathered.selection.class_ids), backbone.card.features
    labels, numbers = train.all_labels(), job.config.sub_classes
    kinds = Rules(views=job.config.views, seed=job.config.seed).kinds(backbone.card.hash, "train")
    views = [part.staged_train(job.staging, kind) for kind in kinds[1:]]
    stage = f"{'tuning ' if part.role == 'tuning' else ''}statistics of {backbone.card.spec}"
    effort = estimate_effort(classes, features, len(labels), len(kinds), numbers)
    meter = Meter(progress, stage, effort)
    meter.tell()

    def on_pass(rows: int) -> None:
        meter.advance(operations_of_pass(rows, features, classes), effort.classifier)

    def on_placed(rows: int, k: int) -> None:
        meter.advance(operations_of_centres(rows, features, k), effort.total)

    moments = accumulate(watch_blocks(train, meter, features, effort.moments), classes, features)
    meter.reach(effort.moments)
    classifier = train_classifier(train, moments, backbone.device, views, on_pass=on_pass)
    top1, top5 = accuracies(test, classifier)
    meter.reach(effort.classifier)
    centres = sub_class_centres(train, labels, classes, features, numbers, job.config.seed, on_placed)
    meter.finish(**({} if top1 is None else {"top-1 %": 100 * top1}))
    return Statistics(moments, classifier, centres, top1, top5, time.perf_counter() - began)


def write_statistics(draft: Draft, statistics: Statistics) -> None:
    """Write the arrays that are not over samples."""
    draft.write_array("train/count", statistics.moments.count)
    draft.write_array("train/mean", statistics.moments.mean)
    draft.write_array("train/scatter_diagonal", statistics.moments.scatter_diagonal)
    draft.write_array("train/within_scatter", statistics.moments.within_scatter)
    for k, (centre, count) in statistics.centres.items():
        draft.write_array(f"train/centre_{k}", centre)
        draft.write_array(f"train/centre_count_{k}", count)
    draft.write_array("classifier/weight", statistics.classifier.weight)
    draft.write_array("classifier/bias", statistics.classifier.bias)


def write_features(draft: Draft, split: str, rows: Staged, classifier: Classifier) -> None:
    """Write features and labels of a split."""
    labels, dtype = rows.all_labels(), feature_dtype(rows, classifier)
    shape = (len(labels), classifier.weight.shape[1])
    draft.write_array_blocks(f"{split}/feature", rows.blocks(dtype), shape, dtype)
    draft.write_array(f"{split}/label", labels)


def feature_dtype(rows: Staged, classifier: Classifier) -> np.dtype[Any]:
    """Return float16 where it loses nothing that matters, else float32.

    That is: every value is finite and below 6e4, and the classifier's top-1 moves by at most 0.1 points.
    """
    if not all(np.abs(features).max() < FLOAT16_LIMIT for features, _ in rows):
        return np.dtype(np.float32)
    rounded = ((features.astype(np.float16).astype(np.float32), labels) for features, labels in rows)
    before, after = accuracies(rows, classifier)[0], accuracies(rounded, classifier)[0]
    shift = abs((after or 0.0) - (before or 0.0))
    return np.dtype(np.float16 if shift <= FLOAT16_SHIFT else np.float32)


def write_exemplars(
    draft: Draft, job: Job, backbone: Backbone, part: Part, train: Staged, moments: Moments
) -> None:
    """Choose, read and write the arrays under ``exemplar/``."""
    labels = train.all_labels()
    choice = choose_exemplars(train, labels, moments.mean, job.config.exemplars, job.config.seed)
    place = np.flatnonzero(part.train_rows)[choice.sample]
    sample = np.where(choice.sample < 0, -1, np.concatenate([p.samples for p in part.train])[place])
    digests = digests_at(job.staging, part.train, place)
    sizes = job.gathered.sizes["train"]
    images = exemplar_images(job.source, sample, digests, sizes, backbone.card.preprocessing)
    draft.write_array("exemplar/image", images)
    draft.write_array("exemplar/role", choice.role)
    draft.write_array("exemplar/sample", sample)


def dataset_card(job: Job, part: Part, train: int, test: int) -> DatasetCard:
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
        source=utf8_only(job.source.spec),
    )


def extraction_card(job: Job, part: Part, backbone: Backbone, statistics: Statistics) -> ExtractionCard:
    """Say how the entry was computed."""
    packages = ("sfm-distill", "torch", "timm", "pillow", "numpy", "zarr")
    return ExtractionCard(
        options=options_of(
            job.config,
            part.role,
            rendering_options(job.source.rendering, composited=part.marked["composited"].count > 0),
        ),
        role=part.role,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        device=job.device,
        threads=torch.get_num_threads(),
        seconds=job.features.seconds,
        statistics_seconds=statistics.seconds,
        images_per_second=job.features.images_per_second,
        listing=job.listing,
        skipped=first_skipped(job.gathered.skipped),
        train_bytes=part.train_bytes,
        flow_cosine=job.flow_cosines.get(backbone.card.hash),
        composited=part.marked["composited"].count,
        composited_example=part.marked["composited"].example,
        dark=part.marked["dark"].count,
        dark_example=part.marked["dark"].example,
        files=job.gathered.files,
    )


def first_skipped(skipped: Sequence[str]) -> list[str]:
    """Return the samples that were skipped, or the first of them where a card cannot hold them all."""
    sizes = np.cumsum([len(json.dumps(line)) for line in skipped])
    told = int(np.searchsorted(sizes, SKIPPED_BYTES, side="right"))
    return [*skipped[:told], *([f"{len(skipped) - told:,} others"] if told < len(skipped) else [])]


def classifier_card(statistics: Statistics) -> ClassifierCard:
    """Say how the classifier was trained and how good it is."""
    return ClassifierCard(
        solver=statistics.classifier.solver,
        l2=statistics.classifier.l2,
        iterations=statistics.classifier.iterations,
        converged=statistics.classifier.converged,
        held_out_top1=statistics.top1,
        held_out_top5=statistics.top5,
    )
