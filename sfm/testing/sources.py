"""The contract of an image source, as tests to inherit; see :class:`SourceTests`."""

import re
from collections.abc import Mapping, Sequence

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from sfm.errors import InputError
from sfm.pipeline.sources import open_source
from sfm.pipeline.sources.class_subsets import select_source_classes
from sfm.pipeline.sources.sample import Sample
from sfm.pipeline.sources.source import Source, Split

ROW_SELECTIONS = 4
"""Selections of rows that are read of each split, in random order."""

DECODED_SAMPLES = 8
"""Samples that are decoded of each split."""


class SourceTests:
    """The contract of a source: every test states one promise in its docstring.

    A subclass gives the fixture `spec`, and is collected by pytest if its name begins with ``Test``. The
    dataset should be small, since every test reads it.

    Examples
    --------
    >>> class TestTsvSource(SourceTests):
    ...     @pytest.fixture
    ...     def spec(self) -> str:
    ...         return "tsv:tests/garments"
    """

    @pytest.fixture
    def spec(self) -> str:
        """Spec of a dataset with a held-out split and two or more classes, as `sfm extract` takes it."""
        raise NotImplementedError("give a fixture `spec` that returns KIND:PLACE")

    @pytest.fixture
    def expected_samples(self) -> Mapping[str, Sequence[tuple[str, bytes]]] | None:
        """Class id and encoded bytes of every sample, by split ("train", "test"), in any order; optional."""
        return None

    @pytest.fixture
    def damaged_spec_and_file_name(self) -> tuple[str, str] | None:
        """Spec of a dataset with one damaged file, and a part of that file's name; optional."""
        return None

    @pytest.fixture
    def source(self, spec: str) -> Source:
        """The opened dataset."""
        return open_source(spec)

    def test_class_ids_are_sorted_and_unique(self, source: Source) -> None:
        """``Source.class_ids`` are sorted and unique; there are as many ``class_names``."""
        if source.class_ids is None:
            assert source.labels is None, "labels are indices of class ids, which the source does not know"
            pytest.skip("the classes are known by reading only")
        assert source.class_ids == sorted(set(source.class_ids))
        assert source.class_names is None or len(source.class_names) == len(source.class_ids)

    def test_labels_are_those_of_the_samples(self, source: Source) -> None:
        """``Shard.labels`` has one label per sample of the shard, the index of its class id.

        Where a shard has no labels, none of the split has, and samples name classes of ``Source.class_ids``.
        """
        for split in source.splits.values():
            assert len({shard.labels is None for shard in split.shards}) == 1
            for shard in split.shards:
                class_ids = [sample.class_id for sample in shard.read(None)]
                if shard.labels is not None:
                    assert source.class_ids is not None
                    assert shard.labels.dtype == np.int32
                    assert [source.class_ids[label] for label in shard.labels] == class_ids
                elif source.class_ids is not None:
                    assert set(class_ids) <= set(source.class_ids)

    def test_both_splits_hold_all_classes(self, source: Source) -> None:
        """A dataset has two classes or more, and each has samples in both splits."""
        classes = [{sample.class_id for sample in read_samples(split)} for split in source.splits.values()]
        assert classes[0] == classes[1]
        assert len(classes[0]) >= 2
        assert source.class_ids is None or classes[0] == set(source.class_ids)

    def test_samples_are_those_of_the_dataset(
        self, source: Source, expected_samples: Mapping[str, Sequence[tuple[str, bytes]]] | None
    ) -> None:
        """No sample is missing, added or changed; needs the fixture `expected_samples`."""
        if expected_samples is None:
            pytest.skip("there is no fixture expected_samples")
        for name, split in source.splits.items():
            actual = sorted((sample.class_id, sample.data) for sample in read_samples(split))
            assert actual == sorted(expected_samples[name])

    def test_a_shard_is_read_again_with_the_same_samples(self, source: Source) -> None:
        """``Shard.read`` yields the same samples each time, also after a reader that stopped early."""
        for split in source.splits.values():
            for shard in split.shards:
                samples = [sample.read() for sample in shard.read(None)]
                assert next(shard.read(None)).read() == samples[0]
                assert [sample.read() for sample in shard.read(None)] == samples

    def test_any_rows_are_read_in_their_order(self, source: Source) -> None:
        """``Split.read`` yields the samples of ascending rows in order, independent of earlier reads."""
        rng = np.random.default_rng(0)
        for split in source.splits.values():
            samples = read_samples(split)
            sizes = count_samples_by_shard(split) if split.labels is None else None
            selections = [np.arange(len(samples)), np.array([len(samples) - 1]), np.array([0])]
            for _ in range(ROW_SELECTIONS):
                selections.append(np.flatnonzero(rng.random(len(samples)) < 0.3))
            for rows in selections:
                assert list(split.read(rows, sizes)) == [samples[row] for row in rows]

    def test_opening_again_gives_the_same_dataset(self, spec: str, source: Source) -> None:
        """A source that is opened again has the same classes, labels and listings: nothing is read again.

        ``Split.listing_digest`` is a digest in hexadecimal digits.
        """
        again = open_source(spec)
        assert (again.name, again.class_ids, again.class_names) == (
            source.name,
            source.class_ids,
            source.class_names,
        )
        for name, split in source.splits.items():
            assert re.fullmatch(r"[0-9a-f]{32,}", split.listing_digest)
            assert again.splits[name].listing_digest == split.listing_digest
            assert len(again.splits[name].shards) == len(split.shards)
            np.testing.assert_array_equal(again.splits[name].labels, split.labels)

    def test_every_sample_says_where_it_lies(self, source: Source) -> None:
        """``location`` names each sample and each shard for error messages: no two alike, none empty."""
        for split in source.splits.values():
            for places in (
                [sample.location for sample in read_samples(split)],
                [shard.location for shard in split.shards],
            ):
                assert all(places)
                assert len(set(places)) == len(places)

    def test_samples_are_decoded_to_images(self, source: Source) -> None:
        """``Source.decode`` turns the bytes of a sample into a Pillow image that is not empty."""
        for split in source.splits.values():
            for sample in read_samples(split)[:DECODED_SAMPLES]:
                image = source.decode(sample.data)
                assert isinstance(image, Image.Image)
                assert min(image.size) > 0

    def test_damaged_images_are_refused(self, source: Source) -> None:
        """``Source.decode`` raises OSError or ValueError for bytes that are not a complete image."""
        data = read_samples(source.train)[0].data
        for damaged in (b"", data[: len(data) // 2]):
            with pytest.raises((OSError, ValueError)):
                source.decode(damaged)

    def test_workers_decode_the_same_images(self, source: Source) -> None:
        """``Source.decode`` and samples can be sent to other processes by cloudpickle."""
        for split in source.splits.values():
            sizes = count_samples_by_shard(split)
            samples = list(split.iter_samples(np.arange(min(sum(sizes), DECODED_SAMPLES)), sizes))
            decode, sent_samples = cloudpickle.loads(cloudpickle.dumps((source.decode, samples)))
            assert sent_samples == samples
            for sample in sent_samples:
                data = sample.read().data
                np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(source.decode(data)))

    def test_a_subset_has_the_samples_of_its_classes(self, source: Source) -> None:
        """``?classes=LIST`` works: the other samples are left out, and the rest is the same, in order."""
        class_ids = sorted({sample.class_id for sample in read_samples(source.train)})[:2]
        subset = select_source_classes(source, class_ids[::-1])
        assert subset.class_ids == class_ids
        for name, split in source.splits.items():
            expected = [sample for sample in read_samples(split) if sample.class_id in class_ids]
            assert read_samples(subset.splits[name]) == expected
            assert subset.splits[name].listing_digest != split.listing_digest
            labels = subset.splits[name].labels
            if labels is not None:
                assert [class_ids[label] for label in labels] == [sample.class_id for sample in expected]

    def test_damage_is_named_in_one_line(self, damaged_spec_and_file_name: tuple[str, str] | None) -> None:
        """A damaged file raises InputError when it is opened or read, in one line that names the file.

        Needs the fixture `damaged_spec_and_file_name`.
        """
        if damaged_spec_and_file_name is None:
            pytest.skip("there is no fixture damaged_spec_and_file_name")
        spec, file_name = damaged_spec_and_file_name
        with pytest.raises(InputError) as refused:
            open_and_read_all_samples(spec)
        assert file_name in str(refused.value)
        assert "\n" not in str(refused.value)


def open_and_read_all_samples(spec: str) -> None:
    """Open a dataset, and read all its samples."""
    for split in open_source(spec).splits.values():
        read_samples(split)


def read_samples(split: Split) -> list[Sample]:
    """Return all samples of a split, read."""
    return [sample.read() for shard in split.shards for sample in shard.read(None)]


def count_samples_by_shard(split: Split) -> list[int]:
    """Return the number of samples of each shard."""
    return [sum(1 for _ in shard.read(None)) for shard in split.shards]
