"""Find the existing entries of a dataset, and check their names and licences against the config."""

from collections.abc import Collection, Iterable, Sequence

from sfm.backbones.build import Backbone
from sfm.errors import InputError
from sfm.pipeline.earlier_versions import has_chosen_background
from sfm.pipeline.entry_rows import list_entry_roles, make_entry_options
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.image_marks import make_rendering_entry_options
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.source import compute_digest
from sfm.stats_store.entry_selection import describe_entry
from sfm.stats_store.publication import PublishResult, compute_options_digest
from sfm.stats_store.store import Store


def digest_source_listing(config: ExtractConfig, source: Source) -> str:
    """Return a digest of everything that determines, before reading, which samples an entry is of."""
    parts = [source.spec.partition(":")[0], source.train.listing_digest, source.test.listing_digest]
    if config.min_count is not None and config.small_classes == "drop":
        parts.append(f"classes of {config.min_count}")
    return compute_digest(*parts)


def derive_listing_digest_with_skipped(listing_digest: str) -> str:
    """Return the listing digest of an entry that lacks unreadable samples.

    Only extractions that may skip samples accept such an entry.
    """
    return compute_digest(listing_digest, "skipped")


def find_existing_entries_by_backbone_hash(
    store: Store, config: ExtractConfig, source: Source, backbones: Collection[Backbone], listing_digest: str
) -> dict[str, list[PublishResult]]:
    """Return the complete sets of entries of this listing and these options, by backbone hash.

    The background is an option only of entries with composited images, which reading finds out: entries with
    and without it are accepted, in this order. An entry of a version that dropped transparency does
    not count where a background was chosen.
    """
    kinds = [make_rendering_entry_options(source.rendering, composited) for composited in (True, False)]
    digests_by_role = [
        [compute_options_digest(make_entry_options(config, role, kind)) for kind in kinds]
        for role in list_entry_roles(config)
    ]
    listings = (
        {listing_digest, derive_listing_digest_with_skipped(listing_digest)}
        if config.on_error == "skip"
        else {listing_digest}
    )
    stored = {
        (s.backbone_hash, s.options): PublishResult(s, "already there")
        for s in store.list_summaries()
        if s.listing in listings
    }
    existing = {}
    for backbone in backbones:
        entries = [
            next((stored[key] for digest in digests if (key := (backbone.card.hash, digest)) in stored), None)
            for digests in digests_by_role
        ]
        if all(entries) and not (
            has_chosen_background(source)
            and any(e and store.open_entry(e.summary).extraction.composited is None for e in entries)
        ):
            existing[backbone.card.hash] = [entry for entry in entries if entry]
    return existing


def require_same_dataset_name(config: ExtractConfig, published_entries: Iterable[PublishResult]) -> None:
    """Refuse a ``--name`` that existing entries do not have.

    Raises
    ------
    InputError
        With their name, and advice.
    """
    others = [
        p.summary for p in published_entries if p.outcome != "published" and p.summary.dataset != config.name
    ]
    if config.name is not None and others:
        raise InputError(
            f"--name {config.name} is not taken: these statistics are in {config.store} already, as "
            f"{describe_entry(others[0])}; use that name, or give the entry the new one with --replace "
            f"(which reads the images again)"
        )


def require_same_licence(
    config: ExtractConfig, store: Store, published_entries: Iterable[PublishResult]
) -> None:
    """Refuse a ``--licence`` that existing entries do not have.

    Raises
    ------
    InputError
        If there is an entry with another licence.
    """
    for published in [p for p in published_entries if p.outcome != "published"] if config.licence else ():
        licence = store.open_entry(published.summary).dataset.licence
        if licence != config.licence:
            raise InputError(
                f"--licence {config.licence}: {published.summary.dataset} through "
                f"{published.summary.backbone} is in {store.url} with licence {licence}; --replace publishes "
                f"it again with this one"
            )


def describe_display_name_changes_by_dataset(
    source: Source, store: Store, published_entries: Sequence[PublishResult]
) -> list[str]:
    """Return a line for every dataset whose stored display names differ from the source's."""
    if source.class_ids is None or source.class_names is None:
        return []
    source_names = dict(zip(source.class_ids, source.class_names, strict=True))
    notes = []
    for published in {p.summary.dataset: p for p in published_entries if p.outcome != "published"}.values():
        card = store.open_entry(published.summary).dataset
        stored_names = zip(card.class_ids, card.class_names, strict=True)
        changed = [(c, old) for c, old in stored_names if source_names.get(c, old) != old]
        if changed:
            class_id, old = changed[0]
            notes.append(
                f"{len(changed)} display name(s) differ from those stored with {card.name}: class {class_id} "
                f"is {old!r} there and {source_names[class_id]!r} now; --replace stores the new ones"
            )
    return notes
