"""The rendering of merged images: check that all inputs converted images to 8-bit RGB in the same way."""

from collections.abc import Sequence
from typing import Any

from sfm.errors import InputError
from sfm.stats_store.entry_selection import describe_entry
from sfm.stats_store.store import Entry

RENDERING_OPTIONS = {
    "background": "have transparent images over different backgrounds",
    "white": "take different values of deep images for white",
}
"""Options that only some images depend on, with the error about inputs that differ in them."""


def map_option_values_to_example_entries(entries: Sequence[Entry], option_name: str) -> dict[Any, Entry]:
    """Return the values of an option among entries, each with an entry that has it."""
    options = [(entry.extraction.options.get(option_name), entry) for entry in entries]
    return {value: entry for value, entry in options if value is not None}


def require_same_rendering(entries: Sequence[Entry]) -> None:
    """Check that entries do not differ in the background of transparent images, nor in the value of white.

    Raises
    ------
    InputError
        Names the entries that differ, and the option.
    """
    for option, conflict in RENDERING_OPTIONS.items():
        entries_by_value = map_option_values_to_example_entries(entries, option)
        if len(entries_by_value) > 1:
            names = " and ".join(describe_entry(entry.summary) for entry in entries_by_value.values())
            raise InputError(
                f"{names} {conflict}: {', '.join(map(str, entries_by_value))}; extract them with one"
            )


def get_common_rendering_options(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the rendering options of merged entries, which do not differ in them."""
    return {
        option: value
        for option in RENDERING_OPTIONS
        for value in map_option_values_to_example_entries(entries, option)
    }


def make_merged_image_mark_fields(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return fields of a merged extraction card: composited and dark images, None where not recorded."""
    cards = [entry.extraction for entry in entries]
    totals: dict[str, Any] = {}
    for mark in ("composited", "dark"):
        counts = [getattr(card, mark) for card in cards]
        examples = [getattr(card, f"{mark}_example") for card in cards]
        totals[mark] = None if None in counts else sum(counts)
        totals[f"{mark}_example"] = next(filter(None, examples), "")
    return totals


def make_unrecorded_rendering_notes(entries: Sequence[Entry]) -> list[str]:
    """Return notes about entries that do not record how their images were rendered."""
    notes = []
    unrecorded = [describe_entry(entry.summary) for entry in entries if entry.extraction.composited is None]
    for background in map_option_values_to_example_entries(entries, "background") if unrecorded else ():
        notes.append(
            f"transparency: {'; '.join(unrecorded)} may have dropped it, other parts are over {background}: "
            f"if these images are transparent, extract them again"
        )
    unnamed = [
        describe_entry(entry.summary) for entry in entries if entry.extraction.options.get("white") is None
    ]
    for white in map_option_values_to_example_entries(entries, "white") if unnamed else ():
        notes.append(
            f"white: {'; '.join(unnamed)} names none, other parts take {white} for it: if these images have "
            f"more than 8 bits, extract them with one"
        )
    return notes
