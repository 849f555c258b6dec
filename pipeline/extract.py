"""``sfm extract``: source -> features -> moments -> entry in the store."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.threads import limit_threads
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.paths import cache_folder, expand_home
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.earlier_versions import asks_for_background, earlier_version_notes, with_marks
from sfm.pipeline.entry import Job, publish_entry
from sfm.pipeline.equipment import cores, equipped, quickest
from sfm.pipeline.existing import display_name_notes, require_licence, require_name
from sfm.pipeline.features import Pass, Rules, Step, follow, missing, stage
from sfm.pipeline.hold_out import open_dataset
from sfm.pipeline.parts import gather, options_of, parts_of, roles_of
from sfm.pipeline.pixels import rendering_options
from sfm.pipeline.precision import flow_cosines
from sfm.pipeline.selection import selection_of
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.source import digest_of
from sfm.pipeline.staging import Staging, Task, open_staging, tasks_of
from sfm.stats_store.cards import ExtractionCard, FileCounts
from sfm.stats_store.location import parse_local_url
from sfm.stats_store.publication import PublishResult, compute_options_digest
from sfm.stats_store.store import Store, create_store


@dataclass(frozen=True)
class Extraction:
    """What an extraction did.

    Attributes
    ----------
    published : list of Published
        One per backbone and role, in the order asked for.
    features : Pass
        What the pass over the images cost; nothing was read if every entry was there already.
    skipped : list of str
        Samples that could not be decoded and are not in the entries: where each is, and why.
    flow_cosines : dict of str to (float or None)
        In another precision than float32, by backbone hash: how alike the flows of a few hundred images are
        in the two precisions. Only of backbones whose entries were not there already.
    cards : list of ExtractionCard
        How each of `published` was computed, in their order; of images that were read, with what this pass
        found transparent or dark.
    notes : tuple of str
        What the source chose where there was a choice, and what entries that were there already lack of what
        was asked for.
    statistics_seconds : float
        Wall time from the end of the pass to the last entry's publication.
    files : FileCounts or None
        What became of the files of this dataset in this pass; if nothing was read, what the entry says, and
        None if it does not.
    """

    published: list[PublishResult]
    features: Pass
    skipped: list[str]
    flow_cosines: dict[str, float | None] = field(default_factory=dict)
    cards: list[ExtractionCard] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    statistics_seconds: float = 0.0
    files: FileCounts | None = None


def extract(config: ExtractConfig, progress: ProgressCallback = no_progress) -> Extraction:
    """Stream a dataset once through backbones and publish its statistics.

    Parameters
    ----------
    config : ExtractConfig
    progress : callable, optional
        Told about every batch of images and every backbone's statistics.

    Returns
    -------
    Extraction

    Raises
    ------
    InputError
        If dataset, backbone, or store cannot be used; nothing is published then. Or if what was asked for
        is in the store under another name than the one given.
    Unfinished
        If workers or processes are lost; a repeat goes on from the partitions that are complete.
    """
    if config.dry_run:
        raise InputError("a dry run is asked for, which sfm.pipeline.plan.plan does")
    with limit_threads(config.threads):
        return extract_with_threads(config, progress)


def extract_with_threads(config: ExtractConfig, progress: ProgressCallback) -> Extraction:
    """Do what :func:`extract` says, with torch's threads set."""
    source = open_dataset(config)
    selection = selection_of(config, source)
    backbones = {
        spec: load_backbone(spec, image_size=config.image_size, device=config.device, progress=progress)
        for spec in dict.fromkeys(config.backbone)
    }
    store = create_store(config.store)
    listing = listing_of(config, source)
    known = (
        {}
        if config.replace or config.rehash
        else known_entries(store, config, source, backbones.values(), listing)
    )
    standing = [p for entries in known.values() for p in entries]
    require_name(config, standing)
    require_licence(config, store, standing)
    absent = {spec: b for spec, b in backbones.items() if b.card.hash not in known}
    if not absent:
        published = [p for b in backbones.values() for p in known[b.card.hash]]
        cards = [store.open_entry(p.summary).extraction for p in published]
        notes = notes_on(source, store, published, cards)
        return Extraction(
            published, Pass(0, 0, 0.0), cards[0].skipped, cards=cards, notes=notes, files=cards[0].files
        )
    key = digest_of(
        listing,
        source.spec,
        str(config.limit_per_class),
        config.precision,
        str(source.rendering),
        version("sfm-distill"),
        torch.__version__,
    )
    rules = Rules(
        config.limit_per_class,
        config.on_error,
        config.precision,
        config.views,
        config.seed,
        source.rendering,
    )
    like = None if config.staging else parse_local_url(config.store)
    with open_staging(staging_folder(config), key[:32], like) as staging:
        tasks = tasks_of(source, selection)
        work = [task for task in tasks if missing(task, absent.values(), staging, rules) is not None]
        with steps_of(config, source, work, absent, staging, rules, progress) as (device, steps):
            features = follow(steps, tasks, work, staging, progress)
        gathered = gather(config, source, tasks, staging)
        final = with_skipped(listing) if gathered.skipped else listing
        cosines = {}
        # Another kind of device than the workers' would round otherwise.
        if config.precision != "float32" and all(b.device.type == device for b in absent.values()):
            cosines = flow_cosines(source, tasks, list(absent.values()), rules, progress, config.threads)
        job = Job(config, source, store, staging, final, device, features, gathered, cosines)
        parts = parts_of(config, gathered, staging)
        began = time.perf_counter()
        for backbone in absent.values():
            known[backbone.card.hash] = [publish_entry(job, backbone, part, progress) for part in parts]
        statistics_seconds = time.perf_counter() - began
    published = [p for b in backbones.values() for p in known[b.card.hash]]
    require_name(config, published)
    require_licence(config, store, published)
    read = [backbone.card.hash for backbone in absent.values()]
    marked = {(backbone, part.role): part.marked for backbone in read for part in parts}
    cards = [
        with_marks(store.open_entry(p.summary).extraction, marked.get((p.summary.backbone_hash, p.summary.role)))
        for p in published
    ]
    notes = notes_on(source, store, published, cards)
    # The entry of the same images may be of another folder, with other files beside them.
    return Extraction(
        published, features, gathered.skipped, cosines, cards, notes, statistics_seconds, gathered.files
    )


@contextmanager
def steps_of(
    config: ExtractConfig,
    source: Source,
    work: Sequence[Task],
    backbones: Mapping[str, Backbone],
    staging: Staging,
    rules: Rules,
    progress: ProgressCallback,
) -> Iterator[tuple[str, Iterator[Step]]]:
    """Have tasks staged in this process, or by workers if they are asked for and there is something to do.

    Yields
    ------
    str, iterator of Step
        The kind of device that the backbones run on, and the work as it is done.
    """
    if work and (config.workers or config.scheduler):
        from sfm.pipeline.cluster import crew

        with (
            crew(config, source, backbones, staging, rules, progress) as workers,
            closing(workers.stage(work)) as steps,
        ):
            yield workers.device, steps
        return
    device = next(iter(backbones.values())).device.type
    if not work:
        yield device, iter(())
        return
    here = quickest(backbones.values(), rules.precision)
    with (
        equipped(source, device, config.threads or cores()) as equipment,
        closing(stage(source, work, here, staging, rules, equipment)) as steps,
    ):
        yield device, steps


def listing_of(config: ExtractConfig, source: Source) -> str:
    """Return the digest of all that tells, before anything is read, which samples an entry is of."""
    parts = [source.spec.partition(":")[0], source.train.listing, source.test.listing]
    if config.min_count is not None and config.small_classes == "drop":
        parts.append(f"classes of {config.min_count}")
    return digest_of(*parts)


def with_skipped(listing: str) -> str:
    """Return what an entry that lacks unreadable samples has in place of the listing.

    So a repeat that may skip samples finds it, and one that may not does not take it for complete.
    """
    return digest_of(listing, "skipped")


def notes_on(
    source: Source, store: Store, published: Sequence[PublishResult], cards: Sequence[ExtractionCard]
) -> tuple[str, ...]:
    """Return what the source chose, and what entries that were there already lack of what was asked for."""
    return (
        *source.inventory.notes,
        *display_name_notes(source, store, published),
        *earlier_version_notes(store, published, cards),
    )


def known_entries(
    store: Store, config: ExtractConfig, source: Source, backbones: Collection[Backbone], listing: str
) -> dict[str, list[PublishResult]]:
    """Return, by backbone hash, the entries of this listing and these options, where none is missing.

    Whether images are composited, so that the background is one of the options, only reading tells: an entry
    of either kind is the one, and the former comes first. One of a version that dropped transparency is not,
    where a background was chosen.
    """
    kinds = [rendering_options(source.rendering, composited) for composited in (True, False)]
    wanted = [[compute_options_digest(options_of(config, role, kind)) for kind in kinds] for role in roles_of(config)]
    listings = {listing, with_skipped(listing)} if config.on_error == "skip" else {listing}
    found = {
        (s.backbone_hash, s.options): PublishResult(s, "already there")
        for s in store.list_summaries()
        if s.listing in listings
    }
    known = {}
    for backbone in backbones:
        entries = [
            next((found[key] for digest in digests if (key := (backbone.card.hash, digest)) in found), None)
            for digests in wanted
        ]
        if all(entries) and not (
            asks_for_background(source)
            and any(e and store.open_entry(e.summary).extraction.composited is None for e in entries)
        ):
            known[backbone.card.hash] = [entry for entry in entries if entry]
    return known


def staging_folder(config: ExtractConfig) -> Path:
    """Return where unfinished work lies: in the store if it is on a disk, else in the user's cache.

    Raises
    ------
    InputError
        If the user has no home, and so no cache.
    """
    if config.staging:
        return expand_home(config.staging)
    if local := parse_local_url(config.store):
        return local / "staging"
    cache = cache_folder()
    if cache is None:
        raise InputError(
            "unfinished work has no place to be kept: no home folder is known (HOME is not set); name a "
            "folder with --staging"
        )
    return cache / "sfm" / "staging"
