"""The contract of sources notices what it forbids."""

from collections.abc import Callable
from dataclasses import replace
from threading import Lock

import numpy as np
import pytest

from sfm.pipeline.sources import Shard, Source, Split
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.source import make_indexed_split
from sfm.testing import SourceTests

PIXMAPS = [f"P5\n1 1\n255\n{chr(65 + i)}".encode() for i in range(6)]


def make_source(**fields: object) -> Source:
    labels = np.arange(6, dtype=np.int32) % 2
    split = make_indexed_split(labels, ["a", "b"], PIXMAPS.__getitem__, lambda i: f"image {i}", "0" * 64)
    return replace(Source("toy", "toy:x", ["a", "b"], None, split, split, decode_image), **fields)


def make_source_with_shard(**fields: object) -> Source:
    (shard,) = make_source().train.shards
    return make_source(train=Split((replace(shard, **fields),), "0" * 64))


def make_source_read_once() -> Source:
    """A shard that can be read once."""
    samples = make_source().train.shards[0].read(None)
    return make_source_with_shard(read=lambda positions: samples)


def make_source_in_reverse() -> Source:
    (shard,) = make_source().train.shards
    return make_source_with_shard(
        read=lambda positions: shard.read(None if positions is None else len(shard.labels) - 1 - positions)
    )


def make_source_with_lock() -> Source:
    """A decoder that cannot be pickled."""
    lock = Lock()

    def decode(data: bytes) -> object:
        with lock:
            return decode_image(data)

    return make_source(decode=decode)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (lambda: make_source(class_ids=["b", "a"]), SourceTests.test_class_ids_are_sorted_and_unique),
        (lambda: make_source(class_names=["A"]), SourceTests.test_class_ids_are_sorted_and_unique),
        (
            lambda: make_source_with_shard(labels=np.ones(6, np.int32)),
            SourceTests.test_labels_are_those_of_the_samples,
        ),
        (
            lambda: make_source_with_shard(labels=np.zeros(5, np.int32)),
            SourceTests.test_labels_are_those_of_the_samples,
        ),
        (lambda: make_source(class_ids=["a", "b", "c"]), SourceTests.test_both_splits_hold_all_classes),
        (make_source_read_once, SourceTests.test_a_shard_is_read_again_with_the_same_samples),
        (make_source_in_reverse, SourceTests.test_any_rows_are_read_in_their_order),
        (lambda: make_source_with_shard(location=""), SourceTests.test_every_sample_says_where_it_lies),
        (lambda: make_source(decode=lambda data: data), SourceTests.test_samples_are_decoded_to_images),
        (lambda: make_source(decode=lambda data: data), SourceTests.test_damaged_images_are_refused),
        (make_source_with_lock, SourceTests.test_workers_decode_the_same_images),
    ],
)
def test_the_source_contract_fails_for_sources_that_break_it(
    broken: Callable[[], Source], test: Callable[..., None]
):
    tests = SourceTests()
    test(tests, make_source())
    with pytest.raises((AssertionError, TypeError, StopIteration, pytest.fail.Exception)):
        test(tests, broken())


def test_the_source_contract_fails_for_a_lost_sample_or_a_changed_listing(monkeypatch):
    tests, source = SourceTests(), make_source()
    samples = [("ab"[i % 2], PIXMAPS[i]) for i in range(6)]
    tests.test_samples_are_those_of_the_dataset(source, {"train": samples, "test": samples})
    with pytest.raises(AssertionError):
        tests.test_samples_are_those_of_the_dataset(source, {"train": samples, "test": samples[1:]})
    other = make_source(train=replace(source.train, listing_digest="1" * 64))
    monkeypatch.setattr("sfm.testing.sources.open_source", lambda spec: other)
    with pytest.raises(AssertionError):
        tests.test_opening_again_gives_the_same_dataset("toy:x", source)
    unlabelled = Shard("a shard", None, source.train.shards[0].read)
    wrong = make_source(test=Split((unlabelled, source.test.shards[0]), "0" * 64))
    with pytest.raises(AssertionError):
        tests.test_labels_are_those_of_the_samples(wrong)
