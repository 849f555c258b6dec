"""Compute the statistics of one backbone's staged features and publish them as an entry of the store."""

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
from sfm.pipeline.adam_classifier import train_classifier_with_adam
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.block_moments import accumulate_moments
from sfm.pipeline.cost_model import (
    StatisticsProgress,
    count_centre_placing_operations,
    count_classifier_pass_operations,
    estimate_statistics_operations,
    iterate_with_moments_progress,
)
from sfm.pipeline.entry_rows import EntryRows, make_entry_options, read_row_digests
from sfm.pipeline.exemplars import choose_nearest_and_random_exemplars, read_exemplar_images
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import PassSummary
from sfm.pipeline.image_marks import make_rendering_entry_options
from sfm.pipeline.linear_classifier import LinearClassifier, measure_top1_and_top5, train_classifier
from sfm.pipeline.pass_result import PassResult
from sfm.pipeline.sources import Source
from sfm.pipeline.staged_features import StagedFeatures
from sfm.pipeline.staging import Staging
from sfm.pipeline.sub_class_centres import SubClassCentres, compute_sub_class_centres
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard
from sfm.stats_store.class_moments import ClassMoments
from sfm.stats_store.publication import Draft, PublishResult, publish_draft
from sfm.stats_store.store import Store
from sfm.text import escape_non_utf8

MAX_SKIPPED_BYTES = 2**22
"""Maximum size of the list of skipped samples in an entry."""

MAX_FLOAT16_VALUE = 6e4
MAX_FLOAT16_SHIFT = 0.001


@dataclass(frozen=True)
class EntryContext:
    """Inputs that all entries of one extraction share.

    Attributes
    ----------
    listing_digest : str
        Digest of the source's listing.
    device_type : str
        Kind of device that the backbones ran on.
    pass_summary : PassSummary
        Cost of the pass over the images.
    pass_result : PassResult
    flow_cosines_with_float32 : dict of str to (float or None)
        Cosine of the flows with those in float32, by backbone hash; empty for float32.
    """

    config: ExtractConfig
    source: Source
    store: Store
    staging: Staging
    listing_digest: str
    device_type: str
    pass_summary: PassSummary
    pass_result: PassResult
    flow_cosines_with_float32: dict[str, float | None]


@dataclass(frozen=True)
class EntryStatistics:
    """Statistics of a dataset's features by one backbone.

    Attributes
    ----------
    centres_by_k : dict of int to SubClassCentres
        By number of sub-classes.
    held_out_top1, held_out_top5 : float or None
        Accuracy of the classifier on the held-out features, as fractions.
    seconds : float
        Wall time of the computation.
    """

    moments: ClassMoments
    classifier: LinearClassifier
    centres_by_k: dict[int, SubClassCentres]
    held_out_top1: float | None
    held_out_top5: float | None
    seconds: float


def compute_and_publish_entry(
    context: EntryContext, backbone: Backbone, entry_rows: EntryRows, progress: ProgressCallback
) -> PublishResult:
    """Compute the statistics of one entry, write them as a run, and commit it; discard it on errors."""
    train = entry_rows.open_train_features(context.staging, backbone.card.hash)
    test = entry_rows.open_test_features(context.staging, backbone.card.hash)
    statistics = compute_entry_statistics(context, backbone, entry_rows, train, test, progress)
    draft = Draft(context.store)
    try:
        write_statistics_arrays(draft, statistics)
        if not context.config.no_held_out:
            dtype = choose_feature_dtype(test, statistics.classifier)
            write_features_and_labels(draft, "test", test, backbone.card.features, dtype)
        if context.config.keep_train_features:
            dtype = choose_feature_dtype(train, statistics.classifier)
            write_features_and_labels(draft, "train", train, backbone.card.features, dtype)
        if context.config.exemplars:
            write_exemplars(draft, context, backbone, entry_rows, train, statistics.moments)
        return publish_draft(
            draft,
            backbone.card,
            make_dataset_card(
                context, entry_rows, len(train.concatenate_labels()), len(test.concatenate_labels())
            ),
            make_extraction_card(context, entry_rows, backbone, statistics),
            make_classifier_card(statistics),
            replace=context.config.replace,
        )
    except BaseException:
        draft.discard()
        raise


def compute_entry_statistics(
    context: EntryContext,
    backbone: Backbone,
    entry_rows: EntryRows,
    train: StagedFeatures,
    test: StagedFeatures,
    progress: ProgressCallback,
) -> EntryStatistics:
    """Stream staged features through moments, classifier, held-out accuracy and sub-class centres."""
    began = time.perf_counter()
    config = context.config
    classes, features = len(context.pass_result.selection.class_ids), backbone.card.features
    labels, sub_class_k_values = train.concatenate_labels(), config.sub_classes
    array_names = PassOptions(views=config.views, seed=config.seed).list_feature_array_names(
        backbone.card.hash, "train"
    )
    views = [entry_rows.open_train_features(context.staging, name) for name in array_names[1:]]
    stage = f"{'tuning ' if entry_rows.role == 'tuning' else ''}statistics of {backbone.card.spec}"
    cost = estimate_statistics_operations(
        classes, features, len(labels), len(array_names), sub_class_k_values, config.classifier
    )
    meter = StatisticsProgress(progress, stage, cost)
    meter.report_if_changed()

    def report_pass_rows(rows: int) -> None:
        meter.advance_within_phase(
            count_classifier_pass_operations(rows, features, classes), cost.until_classifier_end
        )

    def report_placed_centres(rows: int, k: int) -> None:
        meter.advance_within_phase(count_centre_placing_operations(rows, features, k), cost.total)

    moments = accumulate_moments(
        iterate_with_moments_progress(train, meter, features, cost.moments), classes, features
    )
    meter.advance_to_phase_end(cost.moments)
    if config.classifier == "adam":
        classifier = train_classifier_with_adam(
            views, classes, features, config.seed, backbone.device, report_pass_rows
        )
    else:
        classifier = train_classifier(
            train, moments, backbone.device, views, report_pass_rows=report_pass_rows
        )
    top1, top5 = measure_top1_and_top5(test, classifier)
    meter.advance_to_phase_end(cost.until_classifier_end)
    centres = compute_sub_class_centres(
        train, labels, classes, features, sub_class_k_values, config.seed, report_placed_centres
    )
    meter.finish(**({} if top1 is None else {"top-1 %": 100 * top1}))
    return EntryStatistics(moments, classifier, centres, top1, top5, time.perf_counter() - began)


def write_statistics_arrays(draft: Draft, statistics: EntryStatistics) -> None:
    """Write the arrays that have no sample dimension."""
    draft.write_array("train/count", statistics.moments.count)
    draft.write_array("train/mean", statistics.moments.mean)
    draft.write_array("train/scatter_diagonal", statistics.moments.scatter_diagonal)
    draft.write_array("train/within_scatter", statistics.moments.within_scatter)
    for k, (centre, count) in statistics.centres_by_k.items():
        draft.write_array(f"train/centre_{k}", centre)
        draft.write_array(f"train/centre_count_{k}", count)
    draft.write_array("classifier/weight", statistics.classifier.weight)
    draft.write_array("classifier/bias", statistics.classifier.bias)


def write_features_and_labels(
    draft: Draft, split: str, rows: StagedFeatures, feature_count: int, feature_dtype: np.dtype[Any]
) -> None:
    """Write the features and labels of a split."""
    labels = rows.concatenate_labels()
    shape = (len(labels), feature_count)
    draft.write_array_blocks(
        f"{split}/feature", rows.iterate_feature_blocks(feature_dtype), shape, feature_dtype
    )
    draft.write_array(f"{split}/label", labels)


def choose_feature_dtype(rows: StagedFeatures, classifier: LinearClassifier) -> np.dtype[Any]:
    """Return float16 if its rounding is negligible, else float32.

    It is negligible if every value is finite and below 6e4, and the classifier's top-1 moves by at most 0.1
    points.
    """
    if not all(np.abs(features).max() < MAX_FLOAT16_VALUE for features, _ in rows):
        return np.dtype(np.float32)
    rounded = ((features.astype(np.float16).astype(np.float32), labels) for features, labels in rows)
    before, after = measure_top1_and_top5(rows, classifier)[0], measure_top1_and_top5(rounded, classifier)[0]
    shift = abs((after or 0.0) - (before or 0.0))
    return np.dtype(np.float16 if shift <= MAX_FLOAT16_SHIFT else np.float32)


def write_exemplars(
    draft: Draft,
    context: EntryContext,
    backbone: Backbone,
    entry_rows: EntryRows,
    train: StagedFeatures,
    moments: ClassMoments,
) -> None:
    """Choose, read and write the arrays under ``exemplar/``."""
    config = context.config
    choice = choose_nearest_and_random_exemplars(
        train, train.concatenate_labels(), moments.mean, config.exemplars, config.seed
    )
    rows = np.flatnonzero(entry_rows.train_mask)[choice.train_row_indices]
    positions = np.concatenate([p.positions_in_split for p in entry_rows.train_partitions])[rows]
    sample = np.where(choice.train_row_indices < 0, -1, positions)
    digests = read_row_digests(context.staging, entry_rows.train_partitions, rows)
    shard_sizes = context.pass_result.shard_sizes_by_split["train"]
    images = read_exemplar_images(context.source, sample, digests, shard_sizes, backbone.card.preprocessing)
    draft.write_array("exemplar/image", images)
    draft.write_array("exemplar/role", choice.nearest_random_or_none)
    draft.write_array("exemplar/sample", sample)


def make_dataset_card(
    context: EntryContext, entry_rows: EntryRows, train_sample_count: int, test_sample_count: int
) -> DatasetCard:
    """Return the card of the entry's dataset."""
    return DatasetCard(
        name=context.config.name or context.source.name,
        class_ids=context.pass_result.selection.class_ids,
        class_names=context.pass_result.selection.class_names,
        train_samples=train_sample_count,
        test_samples=test_sample_count,
        fingerprint=entry_rows.fingerprint,
        leaves=[entry_rows.fingerprint],
        licence=context.config.licence or context.source.licence,
        source=escape_non_utf8(context.source.spec),
    )


def make_extraction_card(
    context: EntryContext, entry_rows: EntryRows, backbone: Backbone, statistics: EntryStatistics
) -> ExtractionCard:
    """Return the card of how the entry was computed."""
    packages = ("sfm-distill", "torch", "timm", "pillow", "numpy", "zarr")
    return ExtractionCard(
        options=make_entry_options(
            context.config,
            entry_rows.role,
            make_rendering_entry_options(
                context.source.rendering, has_composited=entry_rows.mark_counts["composited"].count > 0
            ),
        ),
        role=entry_rows.role,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        device=context.device_type,
        threads=torch.get_num_threads(),
        seconds=context.pass_summary.seconds,
        statistics_seconds=statistics.seconds,
        images_per_second=context.pass_summary.images_per_second,
        listing=context.listing_digest,
        skipped=truncate_skipped_lines(context.pass_result.skipped_lines),
        train_bytes=entry_rows.encoded_train_bytes,
        flow_cosine=context.flow_cosines_with_float32.get(backbone.card.hash),
        composited=entry_rows.mark_counts["composited"].count,
        composited_example=entry_rows.mark_counts["composited"].example_location,
        dark=entry_rows.mark_counts["dark"].count,
        dark_example=entry_rows.mark_counts["dark"].example_location,
        files=context.pass_result.file_counts,
    )


def truncate_skipped_lines(skipped_lines: Sequence[str]) -> list[str]:
    """Return the skipped samples, truncated to what a card can hold."""
    sizes = np.cumsum([len(json.dumps(line)) for line in skipped_lines])
    count = int(np.searchsorted(sizes, MAX_SKIPPED_BYTES, side="right"))
    return [
        *skipped_lines[:count],
        *([f"{len(skipped_lines) - count:,} others"] if count < len(skipped_lines) else []),
    ]


def make_classifier_card(statistics: EntryStatistics) -> ClassifierCard:
    """Return the card of the classifier's training and accuracy."""
    return ClassifierCard(
        solver=statistics.classifier.solver_description,
        l2=statistics.classifier.l2,
        iterations=statistics.classifier.iterations,
        converged=statistics.classifier.converged,
        held_out_top1=statistics.held_out_top1,
        held_out_top5=statistics.held_out_top5,
    )
