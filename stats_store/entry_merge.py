"""Merge entries of disjoint datasets into the entry of their union, without any image."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, FileCounts
from sfm.stats_store.class_moments import ClassMoments
from sfm.stats_store.classifier_accuracy import compute_top1_top5_accuracies
from sfm.stats_store.digests import compute_sha256, encode_canonical_json
from sfm.stats_store.discriminant import fit_linear_discriminant
from sfm.stats_store.entry_selection import describe_entry
from sfm.stats_store.merge_inputs import (
    EQUAL_OPTIONS,
    MergeInputs,
    SplitFeatures,
    list_available_sub_class_counts,
    make_merge_inputs,
    require_mergeable,
)
from sfm.stats_store.merged_rendering import (
    get_common_rendering_options,
    make_merged_image_mark_fields,
    make_unrecorded_rendering_notes,
)
from sfm.stats_store.merged_statistics import (
    MergedSubClassCentres,
    compute_merged_centres,
    compute_merged_moments,
)
from sfm.stats_store.publication import Draft, PublishResult, publish_draft
from sfm.stats_store.store import Entry, Store

MERGE_STEPS = 4


@dataclass(frozen=True)
class MergedClassifier:
    """The classifier of a merged entry, ``logits = feature @ weight.T + bias``, and how it was made."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    solver: str
    l2: float
    iterations: int
    converged: bool


ClassifierTrainer = Callable[[SplitFeatures, ClassMoments], MergedClassifier]
"""Trains the classifier of a merged entry on its training features."""


@dataclass(frozen=True)
class MergedArrays:
    """The statistics and features from which the arrays of a merged entry are written.

    Attributes
    ----------
    moments : ClassMoments
    centres_by_sub_class_count : dict of int to SubClassCentres
        Centres and their sample counts, by the number of sub-classes.
    classifier : MergedClassifier
    train_features, test_features : SplitFeatures or None
        None unless every input stores the features of the split.
    """

    moments: ClassMoments
    centres_by_sub_class_count: Mapping[int, MergedSubClassCentres]
    classifier: MergedClassifier
    train_features: SplitFeatures | None
    test_features: SplitFeatures | None


@dataclass(frozen=True)
class MergeResult:
    """The published entry of a merge, and notes for the user."""

    publish_result: PublishResult
    notes: list[str]


def merge_entries(
    target_store: Store,
    entries: Sequence[Entry],
    merged_dataset_name: str,
    train_classifier: ClassifierTrainer | None = None,
    *,
    replace: bool = False,
    progress: ProgressCallback = no_progress,
) -> MergeResult:
    """Publish the entry of the union of disjoint datasets, from the entries of these datasets.

    Counts, means and scatters are those of the pooled data, up to rounding. Sub-class centres are clustered
    again from the centres of the inputs, weighted by their counts. Held-out features, and training features
    if every input stores them, are concatenated. The classifier is trained on the training features, or is
    the linear discriminant of the merged moments. Exemplars are left out: they are images, and number samples
    of sources that the union does not have.

    Parameters
    ----------
    target_store : Store
        Store to publish to.
    entries : sequence of Entry
        Two or more, in any order; the result does not depend on it.
    merged_dataset_name : str
        Dataset name of the union.
    train_classifier : callable, optional
        Without it the classifier is the linear discriminant, even if the inputs store features.
    replace : bool
        Publish the next generation if the same union is published already.
    progress : callable, optional

    Raises
    ------
    DamageError
        If an input is damaged.
    InputError
        If the inputs share data, differ in backbone, role or options that shape features, or lack moments.
    """
    start_time = time.perf_counter()
    require_mergeable(entries)
    inputs = make_merge_inputs(entries)
    arrays = compute_merged_arrays(inputs, train_classifier, progress)
    is_trained = arrays.train_features is not None and train_classifier is not None
    draft = Draft(target_store)
    try:
        write_merged_arrays(draft, arrays)
        published = publish_draft(
            draft,
            inputs.entries[0].backbone,
            make_merged_dataset_card(inputs, merged_dataset_name, arrays),
            make_merged_extraction_card(inputs, arrays, is_trained, time.perf_counter() - start_time),
            make_merged_classifier_card(arrays),
            replace=replace,
        )
    except ValidationError as error:
        draft.discard()
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the union is larger than an entry may be: {where}: {first['msg']}") from error
    except BaseException:
        draft.discard()
        raise
    progress(Progress("merge", MERGE_STEPS, MERGE_STEPS, "steps"))
    return MergeResult(published, make_merge_notes(inputs, arrays.classifier))


def compute_merged_arrays(
    inputs: MergeInputs, train_classifier: ClassifierTrainer | None, progress: ProgressCallback
) -> MergedArrays:
    """Merge moments and sub-class centres, and train or solve the classifier."""
    train, test = (
        inputs.get_split_features_if_all_stored("train"),
        inputs.get_split_features_if_all_stored("test"),
    )
    progress(Progress("merge", 0, MERGE_STEPS, "steps"))
    with threadpool_limits(limits=1):  # parallel sums differ from run to run
        moments = compute_merged_moments(inputs)
        progress(Progress("merge", 1, MERGE_STEPS, "steps"))
        centres_by_sub_class_count = {
            k: compute_merged_centres(inputs, k) for k in inputs.list_shared_sub_class_counts()
        }
    progress(Progress("merge", 2, MERGE_STEPS, "steps"))
    classifier = (
        train_classifier(train, moments)
        if train and train_classifier
        else make_discriminant_classifier(moments)
    )
    progress(Progress("merge", 3, MERGE_STEPS, "steps"))
    return MergedArrays(moments, centres_by_sub_class_count, classifier, train, test)


def write_merged_arrays(draft: Draft, arrays: MergedArrays) -> None:
    """Write the arrays of a merged entry to a draft."""
    moments, classifier = arrays.moments, arrays.classifier
    draft.write_array("train/count", moments.count)
    draft.write_array("train/mean", moments.mean)
    draft.write_array("train/scatter_diagonal", moments.scatter_diagonal)
    draft.write_array("train/within_scatter", moments.within_scatter)
    for k, (centre, count) in arrays.centres_by_sub_class_count.items():
        draft.write_array(f"train/centre_{k}", centre)
        draft.write_array(f"train/centre_count_{k}", count)
    draft.write_array("classifier/weight", classifier.weight)
    draft.write_array("classifier/bias", classifier.bias)
    for features in filter(None, (arrays.train_features, arrays.test_features)):
        labels = features.read_labels_in_union()
        shape = (len(labels), moments.mean.shape[1])
        draft.write_array_blocks(
            f"{features.split}/feature", features.iterate_feature_blocks(), shape, features.feature_dtype
        )
        draft.write_array(f"{features.split}/label", labels)


def make_discriminant_classifier(moments: ClassMoments) -> MergedClassifier:
    """Return the linear discriminant of moments as the classifier of a merged entry."""
    discriminant = fit_linear_discriminant(moments)
    solver = f"linear discriminant in closed form from merged moments, shrinkage {discriminant.shrinkage:.4g}"
    return MergedClassifier(
        discriminant.weight, discriminant.bias, solver, l2=0.0, iterations=0, converged=True
    )


def make_merged_entry_options(
    inputs: MergeInputs, is_classifier_trained: bool, sub_class_counts: Sequence[int]
) -> dict[str, Any]:
    """Return the options of a merged entry, whose digest is in its key: all options that shape the arrays."""
    extraction = inputs.entries[0].extraction
    return {
        "origin": "merged",
        "role": extraction.role,
        "parts": sorted(entry.summary.entry_digest for entry in inputs.entries),
        "classifier": "trained" if is_classifier_trained else "linear discriminant",
        "sub_classes": sorted(sub_class_counts),
        **{name: extraction.options[name] for name in EQUAL_OPTIONS if name in extraction.options},
        **get_common_rendering_options(inputs.entries),
    }


def make_merged_extraction_card(
    inputs: MergeInputs, arrays: MergedArrays, is_classifier_trained: bool, merge_seconds: float
) -> ExtractionCard:
    """Return the extraction card of a merged entry."""
    cards = [entry.extraction for entry in inputs.entries]
    return ExtractionCard(
        options=make_merged_entry_options(
            inputs, is_classifier_trained, list(arrays.centres_by_sub_class_count)
        ),
        role=cards[0].role,
        versions={package: version(package) for package in ("sfm-distill", "numpy", "scikit-learn")},
        device="cpu",
        threads=1,
        seconds=merge_seconds,
        images_per_second=0.0,
        skipped=[sample for card in cards for sample in card.skipped],
        **make_merged_image_mark_fields(inputs.entries),
        files=sum_file_counts([card.files for card in cards]),
    )


def make_merged_classifier_card(arrays: MergedArrays) -> ClassifierCard:
    """Return the classifier card of a merged entry, with its accuracies on the held-out features."""
    classifier = arrays.classifier
    top1, top5 = None, None
    if arrays.test_features:
        top1, top5 = compute_top1_top5_accuracies(arrays.test_features, classifier.weight, classifier.bias)
    return ClassifierCard(
        solver=classifier.solver,
        l2=classifier.l2,
        iterations=classifier.iterations,
        converged=classifier.converged,
        held_out_top1=top1,
        held_out_top5=top5,
    )


def sum_file_counts(counts: Sequence[FileCounts | None]) -> FileCounts | None:
    """Return the sum of the file counts of all inputs; None if one of them is not recorded."""
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    unused = sum((Counter(count.unused) for count in known), Counter[str]())
    return FileCounts(
        found=sum(count.found for count in known),
        used=sum(count.used for count in known),
        unused=dict(unused),
    )


def make_merged_dataset_card(inputs: MergeInputs, dataset_name: str, arrays: MergedArrays) -> DatasetCard:
    """Return the dataset card of a merged entry."""
    cards = [entry.dataset for entry in inputs.entries]
    leaves = sorted(leaf for card in cards for leaf in card.leaves)
    return DatasetCard(
        name=dataset_name,
        class_ids=inputs.class_ids,
        class_names=inputs.class_names,
        train_samples=int(arrays.moments.count.sum()),
        test_samples=len(arrays.test_features.read_labels_in_union()) if arrays.test_features else 0,
        fingerprint=compute_sha256(encode_canonical_json(leaves)),
        leaves=leaves,
        licence="; ".join(sorted({card.licence for card in cards})),
        source="merged from " + ", ".join(sorted(describe_entry(entry.summary) for entry in inputs.entries)),
    )


def make_merge_notes(inputs: MergeInputs, classifier: MergedClassifier) -> list[str]:
    """Return notes on data of the inputs that the union lacks, and on how its classifier was made."""
    entries, notes = inputs.entries, [f"classifier: {classifier.solver}"]
    for split, term in (("train", "training features"), ("test", "held-out features")):
        lacking_entries = [
            describe_entry(entry.summary) for entry in entries if f"{split}/feature" not in entry
        ]
        if 0 < len(lacking_entries) < len(entries):
            notes.append(f"no {term}: {'; '.join(lacking_entries)} holds none")
    dropped = set.union(*map(list_available_sub_class_counts, entries)) - set(
        inputs.list_shared_sub_class_counts()
    )
    if dropped:
        numbers = ", ".join(map(str, sorted(dropped)))
        notes.append(f"no {numbers} sub-class centres: not every part holds them")
    notes += make_unrecorded_rendering_notes(entries)
    if any("exemplar/image" in entry for entry in entries):
        notes.append("exemplars are not merged: they are images, and stay where they are")
    return notes
