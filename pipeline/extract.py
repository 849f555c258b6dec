"""``sfm extract``: source -> features -> moments -> entry in the store."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.errors import InputError
from sfm.events import Listener, nobody
from sfm.paths import cache_folder, expand_home
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.entry import Job, publish_entry
from sfm.pipeline.equipment import cores, equipped, quickest
from sfm.pipeline.features import Pass, Rules, Step, follow, missing, stage
from sfm.pipeline.parts import gather, options_of, parts_of, roles_of
from sfm.pipeline.precision import flow_cosines
from sfm.pipeline.selection import selection_of
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.sources.source import digest_of
from sfm.pipeline.staging import Staging, Task, open_staging, tasks_of
from sfm.stats_store.location import local_path
from sfm.stats_store.publish import Published, options_digest
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
    """

    published: list[Published]
    features: Pass
    skipped: list[str]
    flow_cosines: dict[str, float | None] = field(default_factory=dict)


def extract(config: ExtractConfig, progress: Listener = nobody) -> Extraction:
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
        If dataset, backbone, or store cannot be used; nothing is published then.
    Unfinished
        If workers or processes are lost; a repeat goes on from the partitions that are complete.
    """
    if config.dry_run:
        raise InputError("a dry run is asked for, which sfm.pipeline.plan.plan does")
    source = open_source(config.source)
    selection = selection_of(config, source)
    backbones = {
        spec: load_backbone(spec, image_size=config.image_size, device=config.device)
        for spec in dict.fromkeys(config.backbone)
    }
    store = create_store(config.store)
    listing = listing_of(config, source)
    known = (
        {} if config.replace or config.rehash else known_entries(store, config, backbones.values(), listing)
    )
    absent = {spec: b for spec, b in backbones.items() if b.card.hash not in known}
    if not absent:
        published = [p for b in backbones.values() for p in known[b.card.hash]]
        skipped = store.open(published[0].summary).extraction.skipped
        return Extraction(published, Pass(0, 0, 0.0), skipped)
    key = digest_of(
        listing,
        source.spec,
        str(config.limit_per_class),
        config.precision,
        version("sfm-distill"),
        torch.__version__,
    )
    rules = Rules(config.limit_per_class, config.on_error, config.precision, config.views, config.seed)
    like = None if config.staging else local_path(config.store)
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
            cosines = flow_cosines(source, tasks, list(absent.values()), rules, progress)
        job = Job(config, source, store, staging, final, device, features, gathered, cosines)
        parts = parts_of(config, gathered, staging)
        for backbone in absent.values():
            known[backbone.card.hash] = [publish_entry(job, backbone, part, progress) for part in parts]
    published = [p for b in backbones.values() for p in known[b.card.hash]]
    return Extraction(published, features, gathered.skipped, cosines)


@contextmanager
def steps_of(
    config: ExtractConfig,
    source: Source,
    work: Sequence[Task],
    backbones: Mapping[str, Backbone],
    staging: Staging,
    rules: Rules,
    progress: Listener,
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
        equipped(source, device, cores()) as equipment,
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


def known_entries(
    store: Store, config: ExtractConfig, backbones: Collection[Backbone], listing: str
) -> dict[str, list[Published]]:
    """Return, by backbone hash, the entries of this listing and these options, where none is missing."""
    wanted = [options_digest(options_of(config, role)) for role in roles_of(config)]
    listings = {listing, with_skipped(listing)} if config.on_error == "skip" else {listing}
    found = {
        (s.backbone_hash, s.options): Published(s, "already there")
        for s in store.summaries()
        if s.listing in listings
    }
    return {
        b.card.hash: [found[b.card.hash, options] for options in wanted]
        for b in backbones
        if all((b.card.hash, options) in found for options in wanted)
    }


def staging_folder(config: ExtractConfig) -> Path:
    """Return where unfinished work lies: in the store if it is on a disk, else in the user's cache.

    Raises
    ------
    InputError
        If the user has no home, and so no cache.
    """
    if config.staging:
        return expand_home(config.staging)
    if local := local_path(config.store):
        return local / "staging"
    cache = cache_folder()
    if cache is None:
        raise InputError(
            "unfinished work has no place to be kept: no home folder is known (HOME is not set); name a "
            "folder with --staging"
        )
    return cache / "sfm" / "staging"
