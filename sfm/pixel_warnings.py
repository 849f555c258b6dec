"""Warnings of an extraction about images that were composited over a background, or are nearly black."""

from collections.abc import Iterator, Sequence
from typing import Any

from sfm.stats_store.cards import ExtractionCard, Summary
from sfm.text import sanitize_line


def make_composited_and_dark_image_document(card: ExtractionCard) -> dict[str, Any]:
    """Return the counts of composited and dark images of an entry for ``sfm extract --json``."""
    return {
        "composited": card.composited,
        "composited_example": card.composited_example,
        "background": card.options.get("background"),
        "dark": card.dark,
        "dark_example": card.dark_example,
        "white": card.options.get("white"),
    }


def list_composited_and_dark_image_warnings(entries: Sequence[tuple[Summary, ExtractionCard]]) -> list[str]:
    """Return the warnings about composited and dark images, each once."""
    return list(
        dict.fromkeys(line for entry in entries for line in describe_composited_and_dark_images(*entry))
    )


def describe_composited_and_dark_images(summary: Summary, card: ExtractionCard) -> Iterator[str]:
    """Yield the warnings about composited and dark images of one entry."""
    images = f"{summary.train_samples + summary.test_samples} images"
    if summary.role == "tuning":
        images += " of the tuning entry"
    if card.composited:
        yield (
            f"{card.composited} of {images} are not fully opaque"
            f"{format_example_image_in_parentheses(card.composited_example)}: "
            f"composited over {card.options.get('background')}; choose with "
            f"DATASET?background=white, black or #rrggbb"
        )
    if card.dark:
        yield (
            f"{card.dark} of {images} have 16 or 32 bits and no value above 1/16 of their range"
            f"{format_example_image_in_parentheses(card.dark_example)}: nearly black as they are; say which "
            f"value is white, as in DATASET?white=4095"
        )


def format_example_image_in_parentheses(image_name: str) -> str:
    """Return the name of an example image in brackets; nothing if there is none."""
    return f" (such as {sanitize_line(image_name)})" if image_name else ""
