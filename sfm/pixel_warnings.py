"""What an extraction says about images that were composited over a background, or are suspiciously dark."""

from collections.abc import Iterator, Sequence
from typing import Any

from sfm.stats_store.cards import ExtractionCard, Summary
from sfm.text import sanitize_line


def make_pixel_document(card: ExtractionCard) -> dict[str, Any]:
    """Return what ``sfm extract --json`` tells of an entry."""
    return {
        "composited": card.composited,
        "composited_example": card.composited_example,
        "background": card.options.get("background"),
        "dark": card.dark,
        "dark_example": card.dark_example,
        "white": card.options.get("white"),
    }


def list_pixel_warnings(entries: Sequence[tuple[Summary, ExtractionCard]]) -> Iterator[str]:
    """Yield what a user should know of the entries, at most a line per matter and role."""
    told = set()
    for summary, card in entries:
        images = summary.train_samples + summary.test_samples
        of = f"{images} images" + (" of the tuning entry" if summary.role == "tuning" else "")
        for line in list_entry_warnings(card, of):
            if line not in told:
                told.add(line)
                yield line


def list_entry_warnings(card: ExtractionCard, of: str) -> Iterator[str]:
    """Yield what a user should know of one entry.

    Parameters
    ----------
    of : str
        Its images.
    """
    if card.composited:
        yield (
            f"{card.composited} of {of} are not fully opaque{format_example(card.composited_example)}: "
            f"composited over {card.options.get('background')}; choose with "
            f"DATASET?background=white, black or #rrggbb"
        )
    if card.dark:
        yield (
            f"{card.dark} of {of} have 16 or 32 bits and no value above 1/16 of their range"
            f"{format_example(card.dark_example)}: nearly black as they are; say which value is white, as in "
            f"DATASET?white=4095"
        )


def format_example(example: str) -> str:
    """Return an example in brackets, if there is one."""
    return f" (such as {sanitize_line(example)})" if example else ""
