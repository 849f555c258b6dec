"""Checks of existing entries against the name, licence and display names that are asked for."""

from collections.abc import Iterable, Sequence

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import Source
from sfm.stats_store.entry_selection import describe_entry
from sfm.stats_store.publication import PublishResult
from sfm.stats_store.store import Store


def require_same_name(config: ExtractConfig, published_entries: Iterable[PublishResult]) -> None:
    """Refuse a ``--name`` that existing entries do not have.

    Raises
    ------
    InputError
        Says what their name is, and what to do.
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
        If there is such an entry.
    """
    for published in [p for p in published_entries if p.outcome != "published"] if config.licence else ():
        licence = store.open_entry(published.summary).dataset.licence
        if licence != config.licence:
            raise InputError(
                f"--licence {config.licence}: {published.summary.dataset} through "
                f"{published.summary.backbone} is in {store.url} with licence {licence}; --replace publishes "
                f"it again with this one"
            )


def describe_display_name_changes(
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
