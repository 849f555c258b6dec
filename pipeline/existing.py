"""Entries that are in the store already: asked-for names and licences are never passed over silently."""

from collections.abc import Iterable, Sequence

from sfm.errors import InputError
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.sources import Source
from sfm.stats_store.publication import PublishResult
from sfm.stats_store.selection import describe_entry
from sfm.stats_store.store import Store


def require_name(config: ExtractConfig, found: Iterable[PublishResult]) -> None:
    """Refuse a ``--name`` under which entries that were not published now are not to be found.

    Raises
    ------
    InputError
        Says what they are called, and what to do.
    """
    others = [p.summary for p in found if p.outcome != "published" and p.summary.dataset != config.name]
    if config.name is not None and others:
        raise InputError(
            f"--name {config.name} is not taken: these statistics are in {config.store} already, as "
            f"{describe_entry(others[0])}; use that name, or give the entry the new one with --replace (which "
            f"reads the images again)"
        )


def require_licence(config: ExtractConfig, store: Store, found: Iterable[PublishResult]) -> None:
    """Refuse a ``--licence`` that entries which were not published now lack: they would not take it up.

    Raises
    ------
    InputError
        If there is such an entry.
    """
    for published in [p for p in found if p.outcome != "published"] if config.licence else ():
        licence = store.open_entry(published.summary).dataset.licence
        if licence != config.licence:
            raise InputError(
                f"--licence {config.licence}: {published.summary.dataset} through "
                f"{published.summary.backbone} is in {store.url} with licence {licence}; --replace publishes "
                f"it again with this one"
            )


def display_name_notes(source: Source, store: Store, found: Sequence[PublishResult]) -> list[str]:
    """Return a line for every dataset whose stored display names are not those that the source gives now."""
    if source.class_ids is None or source.class_names is None:
        return []
    own = dict(zip(source.class_ids, source.class_names, strict=True))
    notes = []
    for published in {p.summary.dataset: p for p in found if p.outcome != "published"}.values():
        card = store.open_entry(published.summary).dataset
        named = zip(card.class_ids, card.class_names, strict=True)
        changed = [(c, old) for c, old in named if own.get(c, old) != old]
        if changed:
            class_id, old = changed[0]
            notes.append(
                f"{len(changed)} display name(s) differ from those stored with {card.name}: class {class_id} "
                f"is {old!r} there and {own[class_id]!r} now; --replace stores the new ones"
            )
    return notes
