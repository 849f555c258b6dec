"""``sfm extract``: source -> features -> moments -> entry in the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.events import Listener, nobody
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.entry import Job, publish_entry
from sfm.pipeline.features import Pass, stage_features
from sfm.pipeline.parts import options_of, parts_of, roles_of
from sfm.pipeline.sources import open_source
from sfm.pipeline.sources.source import digest_of, with_min_count
from sfm.pipeline.staging import open_staging, partitions
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
    """

    published: list[Published]
    features: Pass


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
    """
    source = open_source(config.source)
    if config.min_count is not None:
        source = with_min_count(source, config.min_count, drop=config.small_classes == "drop")
    backbones = [
        load_backbone(spec, image_size=config.image_size, device=config.device)
        for spec in dict.fromkeys(config.backbone)
    ]
    store = create_store(config.store)
    listing = digest_of(source.spec.partition(":")[0], source.train.listing, source.test.listing)
    known = {} if config.replace or config.rehash else known_entries(store, config, backbones, listing)
    missing = [b for b in backbones if b.card.hash not in known]
    if not missing:
        return Extraction([p for b in backbones for p in known[b.card.hash]], Pass(0, 0, 0.0))
    limit = config.limit_per_class
    key = digest_of(listing, source.spec, str(limit), version("sfm-distill"), torch.__version__)
    with open_staging(staging_folder(config), key[:32]) as staging:
        work = partitions(source, limit)
        features = stage_features(source, work, missing, staging, progress)
        parts = parts_of(config, source, work, staging)
        job = Job(config, source, store, staging, listing, features)
        for backbone in missing:
            known[backbone.card.hash] = [publish_entry(job, backbone, part, progress) for part in parts]
    return Extraction([p for b in backbones for p in known[b.card.hash]], features)


def known_entries(
    store: Store, config: ExtractConfig, backbones: Sequence[Backbone], listing: str
) -> dict[str, list[Published]]:
    """Return, by backbone hash, the entries of this listing and these options, where none is missing."""
    wanted = [options_digest(options_of(config, role)) for role in roles_of(config)]
    found = {
        (s.backbone_hash, s.options): Published(s, "already there")
        for s in store.summaries()
        if s.listing == listing
    }
    return {
        b.card.hash: [found[b.card.hash, options] for options in wanted]
        for b in backbones
        if all((b.card.hash, options) in found for options in wanted)
    }


def staging_folder(config: ExtractConfig) -> Path:
    """Return where unfinished work lies: in the store if it is on a disk, else in the user's cache."""
    if config.staging:
        return Path(config.staging).expanduser()
    local = local_path(config.store)
    return local / "staging" if local else Path.home() / ".cache" / "sfm" / "staging"
