"""How the images of a merge's parts became opaque 8-bit pixels, and whether that was one way."""

from collections.abc import Sequence
from typing import Any

from sfm.errors import InputError
from sfm.stats_store.select import described
from sfm.stats_store.store import Entry

DIFFERING = {
    "background": "have transparent images over different backgrounds",
    "white": "take different values of deep images for white",
}
"""Options that only some images depend on, and what is wrong with parts that have different ones."""


def holders_by_value(parts: Sequence[Entry], option: str) -> dict[Any, Entry]:
    """Return the values of an option that parts have, and a part with each; parts without it do not count."""
    options = [(part.extraction.options.get(option), part) for part in parts]
    return {value: part for value, part in options if value is not None}


def require_one_rendering(parts: Sequence[Entry]) -> None:
    """Refuse parts with transparent images over different backgrounds, or with different values of white.

    Raises
    ------
    InputError
        Says which parts, and why.
    """
    for option, differing in DIFFERING.items():
        chosen = holders_by_value(parts, option)
        if len(chosen) > 1:
            which = " and ".join(described(part.summary) for part in chosen.values())
            raise InputError(f"{which} {differing}: {', '.join(map(str, chosen))}; extract them with one")


def common_rendering(parts: Sequence[Entry]) -> dict[str, Any]:
    """Return what the options of the union say: what parts say, who have no different values."""
    return {option: value for option in DIFFERING for value in holders_by_value(parts, option)}


def add_marks(parts: Sequence[Entry]) -> dict[str, Any]:
    """Return how many images of the parts were composited, or are dark; None where a part does not tell."""
    cards = [part.extraction for part in parts]
    found: dict[str, Any] = {}
    for mark in ("composited", "dark"):
        counts = [getattr(card, mark) for card in cards]
        examples = [getattr(card, f"{mark}_example") for card in cards]
        found[mark] = None if None in counts else sum(counts)
        found[f"{mark}_example"] = next(filter(None, examples), "")
    return found


def rendering_notes(parts: Sequence[Entry]) -> list[str]:
    """Return where it is not known that the images of all parts became opaque 8-bit pixels in one way."""
    notes = []
    silent = [described(p.summary) for p in parts if p.extraction.composited is None]
    for background in holders_by_value(parts, "background") if silent else ():
        notes.append(
            f"transparency: {'; '.join(silent)} may have dropped it, other parts are over {background}: if "
            f"these images are transparent, extract them again"
        )
    without = [described(p.summary) for p in parts if p.extraction.options.get("white") is None]
    for white in holders_by_value(parts, "white") if without else ():
        notes.append(
            f"white: {'; '.join(without)} names none, other parts take {white} for it: if these images have "
            f"more than 8 bits, extract them with one"
        )
    return notes
