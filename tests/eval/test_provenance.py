"""What the report says extracting took: the pass over the images, and the statistics after it."""

import pytest

from sfm.eval.report.provenance import describe_extraction_time
from sfm.stats_store.cards import ExtractionCard


def make_card(**given) -> ExtractionCard:
    values = {"options": {"origin": "extracted"}, "role": "full", "versions": {}, "device": "cpu"}
    return ExtractionCard(**(values | {"threads": 1, "seconds": 37.0, "images_per_second": 9.0} | given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"statistics_seconds": 50.0}, ["pass over the images 37", "statistics 50"]),
        ({}, ["pass over the images", "not timed"]),
        ({"options": {"origin": "merged"}}, ["37"]),
    ],
)
def test_extraction_time_includes_statistics_or_says_they_were_not_timed(given, words):
    said = describe_extraction_time(make_card(**given))
    assert all(word in said for word in words)
    assert ("statistics" in said) == (given.get("options") is None)
