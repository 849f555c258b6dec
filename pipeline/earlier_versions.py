"""Entries of versions that dropped transparency: what they cannot stand for, and what to do about them."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict

from sfm.backbones.rendering import DEFAULT
from sfm.pipeline.pixels import Marked
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.options import split_options
from sfm.stats_store.cards import ExtractionCard, Summary
from sfm.stats_store.publication import PublishResult
from sfm.stats_store.store import Store


def asks_for_background(source: Source) -> bool:
    """Say whether a background was chosen: an entry that may have dropped transparency is no answer then."""
    _, options = split_options(source.spec.partition(":")[2])
    return "background" in options or source.rendering.background != DEFAULT.background


def with_marks(card: ExtractionCard, marked: dict[str, Marked] | None) -> ExtractionCard:
    """Return the card of an entry with what this pass found in its images, if they were read.

    The entry of the same images may be of an earlier version, which did not look.
    """
    found = {name: asdict(mark) for name, mark in (marked or {}).items()}
    counts = {name: mark["count"] for name, mark in found.items()}
    return card.model_copy(
        update=counts | {f"{name}_example": mark["example"] for name, mark in found.items()}
    )


def earlier_version_notes(
    store: Store, published: Sequence[PublishResult], cards: Sequence[ExtractionCard]
) -> list[str]:
    """Return what to do about entries of versions that dropped transparency.

    Parameters
    ----------
    cards : sequence of ExtractionCard
        Of `published`, with what a pass found if there was one.
    """
    notes = []
    unknown = [p.summary for p, card in zip(published, cards, strict=True) if card.composited is None]
    if unknown:
        notes.append(
            f"{pins(unknown)} is of an earlier version, which dropped transparency: if images may be "
            f"transparent, read them again with --rehash, and if that publishes a new entry, remove the "
            f"earlier one: {removal(store, unknown)}"
        )
    composited = [p.summary for p, card in zip(published, cards, strict=True) if card.composited]
    beside = superseded(store, composited) if composited else []
    if beside:
        notes.append(
            f"{pins(beside)} is of the same images and of an earlier version, which dropped transparency; "
            f"remove it, or pin the entry to use: {removal(store, beside)}"
        )
    return notes


def superseded(store: Store, composited: Collection[Summary]) -> list[Summary]:
    """Return the entries of the same images, backbone, role and name that dropped transparency."""

    def identity(summary: Summary) -> tuple[str, ...]:
        return summary.backbone_hash, summary.fingerprint, summary.role, summary.dataset

    own = {identity(summary) for summary in composited}
    new = {summary.key for summary in composited}
    alike = [s for s in store.list_summaries() if identity(s) in own and s.key not in new]
    return [s for s in alike if store.open_entry(s).extraction.composited is None]


def pins(summaries: Sequence[Summary]) -> str:
    """Return entries as ``NAME@DIGEST``, on one line."""
    return ", ".join(f"{s.dataset}@{s.entry_digest[:12]}" for s in summaries)


def removal(store: Store, summaries: Sequence[Summary]) -> str:
    """Return the commands that remove entries."""
    return "; ".join(f"sfm store rm {shlex.quote(store.url)} {shlex.quote(pins([s]))}" for s in summaries)
