"""Find entries of earlier versions, which dropped transparency, and advise how to replace them."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict

from sfm.backbones.rendering import DEFAULT_RENDERING
from sfm.pipeline.image_marks import ImageMarkCount
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.spec_options import split_location_and_options
from sfm.stats_store.cards import ExtractionCard, Summary
from sfm.stats_store.publication import PublishResult
from sfm.stats_store.store import Store


def has_chosen_background(source: Source) -> bool:
    """Return whether a background was chosen: an entry that dropped transparency does not count then."""
    _, options = split_location_and_options(source.spec.partition(":")[2])
    return "background" in options or source.rendering.background != DEFAULT_RENDERING.background


def copy_card_with_image_mark_counts(
    card: ExtractionCard, mark_counts: dict[str, ImageMarkCount] | None
) -> ExtractionCard:
    """Return an extraction card with the mark counts of this pass, if images were read.

    The entry of the same images may be of an earlier version, which did not count them.
    """
    found = {name: asdict(mark) for name, mark in (mark_counts or {}).items()}
    counts = {name: mark["count"] for name, mark in found.items()}
    return card.model_copy(
        update=counts | {f"{name}_example": mark["example_location"] for name, mark in found.items()}
    )


def describe_entries_that_dropped_transparency(
    store: Store, published: Sequence[PublishResult], cards: Sequence[ExtractionCard]
) -> list[str]:
    """Return notes on entries of versions that dropped transparency, with advice on replacing them.

    Parameters
    ----------
    cards : sequence of ExtractionCard
        Of `published`, with the mark counts of this pass if there was one.
    """
    notes = []
    unknown = [p.summary for p, card in zip(published, cards, strict=True) if card.composited is None]
    if unknown:
        notes.append(
            f"{format_entry_pins(unknown)} is of an earlier version, which dropped transparency: if images "
            f"may be transparent, read them again with --rehash, and if that publishes a new entry, remove "
            f"the earlier one: {format_removal_commands(store, unknown)}"
        )
    composited = [p.summary for p, card in zip(published, cards, strict=True) if card.composited]
    superseded = find_entries_superseded_by_composited(store, composited) if composited else []
    if superseded:
        notes.append(
            f"{format_entry_pins(superseded)} is of the same images and of an earlier version, which dropped "
            f"transparency; remove it, or pin the entry to use: {format_removal_commands(store, superseded)}"
        )
    return notes


def find_entries_superseded_by_composited(
    store: Store, composited_entries: Collection[Summary]
) -> list[Summary]:
    """Return the entries of the same images, backbone, role and name that dropped transparency."""

    def get_identity(summary: Summary) -> tuple[str, ...]:
        return summary.backbone_hash, summary.fingerprint, summary.role, summary.dataset

    own = {get_identity(summary) for summary in composited_entries}
    new = {summary.key for summary in composited_entries}
    same_images = [s for s in store.list_summaries() if get_identity(s) in own and s.key not in new]
    return [s for s in same_images if store.open_entry(s).extraction.composited is None]


def format_entry_pins(summaries: Sequence[Summary]) -> str:
    """Return entries as ``NAME@DIGEST``, on one line."""
    return ", ".join(f"{s.dataset}@{s.entry_digest[:12]}" for s in summaries)


def format_removal_commands(store: Store, summaries: Sequence[Summary]) -> str:
    """Return the commands that remove entries."""
    return "; ".join(
        f"sfm store rm {shlex.quote(store.url)} {shlex.quote(format_entry_pins([s]))}" for s in summaries
    )
