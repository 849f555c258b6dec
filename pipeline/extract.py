"""Extract a dataset: source -> features -> moments -> entry in the store."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.paths import expand_home, get_cache_folder
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.earlier_versions import (
    copy_card_with_image_mark_counts,
    describe_entries_that_dropped_transparency,
)
from sfm.pipeline.entry import EntryContext, compute_and_publish_entry
from sfm.pipeline.entry_rows import EntryRows, select_entry_rows
from sfm.pipeline.existing_entries import (
    derive_listing_digest_with_skipped,
    describe_display_name_changes_by_dataset,
    digest_source_listing,
    find_existing_entries_by_backbone_hash,
    require_same_dataset_name,
    require_same_licence,
)
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import (
    PassIncrement,
    PassSummary,
    find_unstaged_backbones_unless_complete,
    run_and_track_pass,
    stage_tasks,
)
from sfm.pipeline.flow_agreement import compute_flow_cosines_with_float32
from sfm.pipeline.hold_out import open_extraction_source
from sfm.pipeline.partition_tasks import PartitionTask, make_tasks
from sfm.pipeline.pass_result import PassResult, collect_pass_result
from sfm.pipeline.runtime import count_cores, extraction_runtime, optimize_for_inference
from sfm.pipeline.selection import select_samples_if_labels_known
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.source import compute_digest
from sfm.pipeline.staging import Staging, open_staging_and_delete_on_success
from sfm.stats_store.cards import ExtractionCard, FileCounts
from sfm.stats_store.location import parse_local_path
from sfm.stats_store.publication import PublishResult
from sfm.stats_store.store import Store, open_or_create_store


@dataclass(frozen=True)
class ExtractionResult:
    """The entries that an extraction published, and its cost.

    Attributes
    ----------
    published : list of PublishResult
        One per backbone and role, in the order of the config.
    pass_summary : PassSummary
        Cost of the pass over the images; nothing was read if every entry existed.
    skipped : list of str
        Samples that could not be decoded and are not in the entries: location and reason.
    flow_cosines : dict of str to (float or None)
        For precisions other than float32, by backbone hash: cosine between the flows of a few hundred images
        in this precision and in float32. Only for backbones whose entries did not exist.
    cards : list of ExtractionCard
        How each of `published` was computed, in their order; of images that were read, with the transparent
        and dark images that this pass counted.
    notes : tuple of str
        Choices that the source made, and how existing entries differ from the config.
    statistics_seconds : float
        Wall time from the end of the pass to the last entry's publication.
    files : FileCounts or None
        Used and unused files of the dataset in this pass; if nothing was read, those in the entry, and None
        if it has none.
    """

    published: list[PublishResult]
    pass_summary: PassSummary
    skipped: list[str]
    flow_cosines: dict[str, float | None] = field(default_factory=dict)
    cards: list[ExtractionCard] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    statistics_seconds: float = 0.0
    files: FileCounts | None = None


class CompletedPass(NamedTuple):
    """What a pass over all tasks leaves, besides the staged features.

    Attributes
    ----------
    device_type : str
        Kind of device that the backbones ran on.
    summary : PassSummary
    result : PassResult
    flow_cosines_with_float32 : dict of str to (float or None)
        Cosine of the flows with those in float32, by backbone hash; empty for float32.
    """

    device_type: str
    summary: PassSummary
    result: PassResult
    flow_cosines_with_float32: dict[str, float | None]


class PassIncrementStream(NamedTuple):
    """A pass that runs as its increments are consumed, and the kind of device that the backbones run on."""

    device_type: str
    increments: Iterator[PassIncrement]


def extract(config: ExtractConfig, progress: ProgressCallback = no_progress) -> ExtractionResult:
    """Stream a dataset once through backbones and publish its statistics.

    Parameters
    ----------
    config : ExtractConfig
    progress : callable, optional
        Called after every batch of images and every backbone's statistics.

    Returns
    -------
    ExtractionResult

    Raises
    ------
    InputError
        If dataset, backbone, or store cannot be used; nothing is published then. Or if the entries
        exist under another name.
    IncompleteExtractionError
        If workers or processes are lost; a repeat resumes from the partitions that are complete.
    """
    if config.dry_run:
        raise InputError("dry_run is set: call sfm.pipeline.dry_run.estimate_extraction")
    with limit_cpu_threads(config.threads):
        source = open_extraction_source(config)
        tasks = make_tasks(source, select_samples_if_labels_known(config, source))
        backbones = {
            spec: load_backbone(
                spec,
                image_size=config.image_size,
                device=config.device,
                fold_norms=config.execution != "eager",
                progress=progress,
            )
            for spec in dict.fromkeys(config.backbone)
        }
        store = open_or_create_store(config.store)
        listing = digest_source_listing(config, source)
        existing = (
            {}
            if config.replace or config.rehash
            else find_existing_entries_by_backbone_hash(store, config, source, backbones.values(), listing)
        )
        existing_entries = [published for entries in existing.values() for published in entries]
        require_same_dataset_name(config, existing_entries)
        require_same_licence(config, store, existing_entries)
        if any(backbone.card.hash not in existing for backbone in backbones.values()):
            return extract_missing_entries(config, source, tasks, backbones, store, existing, progress)
        published = [entry for b in backbones.values() for entry in existing[b.card.hash]]
        cards = [store.open_entry(entry.summary).extraction for entry in published]
        return ExtractionResult(
            published,
            PassSummary(0, 0, 0.0),
            cards[0].skipped,
            cards=cards,
            notes=collect_notes(source, store, published, cards),
            files=cards[0].files,
        )


def extract_missing_entries(
    config: ExtractConfig,
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones_by_spec: Mapping[str, Backbone],
    store: Store,
    existing_entries_by_backbone_hash: Mapping[str, list[PublishResult]],
    progress: ProgressCallback,
) -> ExtractionResult:
    """Run the pass and publish the entries of the backbones that have none.

    Parameters
    ----------
    backbones_by_spec : mapping of str to Backbone
        All requested backbones.
    existing_entries_by_backbone_hash : mapping of str to list of PublishResult
    """
    missing = {
        spec: b
        for spec, b in backbones_by_spec.items()
        if b.card.hash not in existing_entries_by_backbone_hash
    }
    listing = digest_source_listing(config, source)
    options = PassOptions(
        config.limit_per_class,
        config.on_error,
        config.precision,
        config.views,
        config.seed,
        source.rendering,
        config.execution,
    )
    like = None if config.staging else parse_local_path(config.store)
    key = make_staging_key(config, source, listing)
    with open_staging_and_delete_on_success(choose_staging_parent_folder(config), key, like) as staging:
        device, summary, result, cosines = run_pass(
            config, source, tasks, missing, staging, options, progress
        )
        final_listing = derive_listing_digest_with_skipped(listing) if result.skipped_lines else listing
        context = EntryContext(
            config, source, store, staging, final_listing, device, summary, result, cosines
        )
        entry_rows = select_entry_rows(config, result, staging)
        began = time.perf_counter()
        new = {
            backbone.card.hash: [
                compute_and_publish_entry(context, backbone, rows, progress) for rows in entry_rows
            ]
            for backbone in missing.values()
        }
        statistics_seconds = time.perf_counter() - began
    published = [
        entry
        for b in backbones_by_spec.values()
        for entry in ({**existing_entries_by_backbone_hash, **new})[b.card.hash]
    ]
    require_same_dataset_name(config, published)
    require_same_licence(config, store, published)
    cards = read_extraction_cards_with_image_mark_counts(store, published, new, entry_rows)
    # An existing entry of the same images may be of another folder, with other files beside them.
    return ExtractionResult(
        published,
        summary,
        result.skipped_lines,
        cosines,
        cards,
        collect_notes(source, store, published, cards),
        statistics_seconds,
        result.file_counts,
    )


def run_pass(
    config: ExtractConfig,
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones_by_spec: Mapping[str, Backbone],
    staging: Staging,
    options: PassOptions,
    progress: ProgressCallback,
) -> CompletedPass:
    """Stage the features of all tasks, and collect their results."""
    pending = [
        task
        for task in tasks
        if find_unstaged_backbones_unless_complete(task, backbones_by_spec.values(), staging, options)
        is not None
    ]
    with pass_increment_stream(config, source, pending, backbones_by_spec, staging, options, progress) as (
        device,
        steps,
    ):
        summary = run_and_track_pass(steps, tasks, pending, staging, progress)
    result = collect_pass_result(config, source, tasks, staging)
    cosines = {}
    # Another kind of device than the workers' would round differently.
    if config.precision != "float32" and all(b.device.type == device for b in backbones_by_spec.values()):
        cosines = compute_flow_cosines_with_float32(
            source, tasks, list(backbones_by_spec.values()), options, progress, config.threads
        )
    return CompletedPass(device, summary, result, cosines)


@contextmanager
def pass_increment_stream(
    config: ExtractConfig,
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones_by_spec: Mapping[str, Backbone],
    staging: Staging,
    options: PassOptions,
    progress: ProgressCallback,
) -> Iterator[PassIncrementStream]:
    """Stage tasks in this process, or on workers if the config asks for them."""
    if tasks and (config.workers or config.scheduler):
        from sfm.pipeline.worker_pool import worker_pool

        with (
            worker_pool(config, source, backbones_by_spec, staging, options, progress) as workers,
            closing(workers.stage_tasks(tasks)) as steps,
        ):
            yield PassIncrementStream(workers.device_type, steps)
        return
    device = next(iter(backbones_by_spec.values())).device.type
    if not tasks:
        yield PassIncrementStream(device, iter(()))
        return
    fast_backbones = optimize_for_inference(backbones_by_spec.values(), options.precision, options.execution)
    with (
        extraction_runtime(source, device, config.threads or count_cores()) as runtime,
        closing(stage_tasks(source, tasks, fast_backbones, staging, options, runtime)) as steps,
    ):
        yield PassIncrementStream(device, steps)


def make_staging_key(config: ExtractConfig, source: Source, listing_digest: str) -> str:
    """Return the name of the staging folder: equal for extractions that would compute the same features."""
    return compute_digest(
        listing_digest,
        source.spec,
        str(config.limit_per_class),
        config.precision,
        str(source.rendering),
        version("sfm-distill"),
        torch.__version__,
        *(() if config.execution == "auto" else (config.execution,)),
    )[:32]


def read_extraction_cards_with_image_mark_counts(
    store: Store,
    published: Sequence[PublishResult],
    hashes_of_backbones_in_pass: Collection[str],
    entry_rows: Sequence[EntryRows],
) -> list[ExtractionCard]:
    """Return the extraction cards of entries; those of new backbones get the mark counts of this pass."""
    marked = {
        (backbone, rows.role): rows.mark_counts
        for backbone in hashes_of_backbones_in_pass
        for rows in entry_rows
    }
    return [
        copy_card_with_image_mark_counts(
            store.open_entry(entry.summary).extraction,
            marked.get((entry.summary.backbone_hash, entry.summary.role)),
        )
        for entry in published
    ]


def collect_notes(
    source: Source, store: Store, published: Sequence[PublishResult], cards: Sequence[ExtractionCard]
) -> tuple[str, ...]:
    """Return the choices of the source, and how existing entries differ from the config."""
    return (
        *source.inventory.notes,
        *describe_display_name_changes_by_dataset(source, store, published),
        *describe_entries_that_dropped_transparency(store, published, cards),
    )


def choose_staging_parent_folder(config: ExtractConfig) -> Path:
    """Return the parent of staging folders: in the store if it is on a disk, else in the user's cache.

    Raises
    ------
    InputError
        If the user has no home, and so no cache.
    """
    if config.staging:
        return expand_home(config.staging)
    if local := parse_local_path(config.store):
        return local / "staging"
    cache = get_cache_folder()
    if cache is None:
        raise InputError(
            "there is no folder for unfinished work: no home folder is known (HOME is not set); name a "
            "folder with --staging"
        )
    return cache / "sfm" / "staging"
