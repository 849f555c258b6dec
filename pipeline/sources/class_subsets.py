"""Subsets of sources by class, and of splits by row."""

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.sources.source import Shard, Source, Split, compute_digest
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.text import format_names

OTHER_CLASSES_KIND = "images of other classes"

Item = TypeVar("Item")


def select_source_classes(
    source: Source, class_ids: Sequence[str], class_names: Sequence[str] | None = None
) -> Source:
    """Return a source with some of the classes of another; samples of other classes are not decoded.

    If labels are known in advance, samples of other classes are not read either.

    Parameters
    ----------
    class_ids : sequence of str
        In any order.
    class_names : sequence of str, optional
        Display names in the order of `class_ids`; by default those of the source.

    Raises
    ------
    InputError
        If the source lacks one of the classes, or a class is given twice.
    """
    ids = sorted(class_ids)
    repeated = sorted({a for a, b in pairwise(ids) if a == b})
    if repeated:
        raise InputError(f"the class list for {source.spec} names {format_names(repeated)} twice")
    if class_names is not None:
        name_by_id = dict(zip(class_ids, class_names, strict=True))
    else:
        own_ids = source.class_ids or ()
        name_by_id = dict(zip(own_ids, source.class_names or own_ids, strict=True))
    if source.class_ids is not None:
        absent = [class_id for class_id in ids if class_id not in set(source.class_ids)]
        if absent:
            close = difflib.get_close_matches(absent[0], source.class_ids, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise InputError(f"{source.spec} has no class {format_names(absent)}{hint}")
    label_by_id = {class_id: label for label, class_id in enumerate(ids)}
    dropped_count = 0

    def select_split(split: Split) -> Split:
        labels, listing_digest = split.labels, compute_digest(split.listing_digest, "\n".join(ids))
        if labels is None:
            return Split(
                tuple(filter_shard_by_class(shard, label_by_id.keys()) for shard in split.shards),
                listing_digest,
            )
        assert source.class_ids is not None
        new_labels = np.array([label_by_id.get(class_id, -1) for class_id in source.class_ids], np.int32)
        rows = np.flatnonzero(new_labels[labels] >= 0)
        nonlocal dropped_count
        dropped_count += len(labels) - len(rows)
        return select_split_rows(split, rows, new_labels[labels[rows]], listing_digest)

    train = select_split(source.train)
    test = select_split(source.test) if source.test.shards else source.test
    return replace(
        source,
        class_ids=ids,
        class_names=[name_by_id.get(class_id, class_id) for class_id in ids],
        train=train,
        test=test,
        inventory=source.inventory.with_more_unused(OTHER_CLASSES_KIND, dropped_count),
    )


def filter_shard_by_class(shard: Shard, kept_class_ids: Collection[str]) -> Shard:
    """Return a shard that drops samples of other classes while reading; positions include dropped samples."""

    def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
        shard.unused_by_kind[OTHER_CLASSES_KIND] = 0
        selected = (sample for sample in shard.read(None) if is_selected(sample))
        return selected if positions is None else take_ascending_positions(selected, positions)

    def is_selected(sample: Sample | SampleFile) -> bool:
        if sample.class_id in kept_class_ids:
            return True
        shard.unused_by_kind[OTHER_CLASSES_KIND] += 1
        return False

    return replace(shard, read=read)


def take_ascending_positions(items: Iterator[Item], positions: npt.NDArray[np.int64]) -> Iterator[Item]:
    """Yield the items at ascending positions of a stream, and stop after the last position."""
    remaining = iter(positions.tolist())
    target = next(remaining, None)
    for position, item in enumerate(items):
        if position == target:
            yield item
            target = next(remaining, None)
        if target is None:
            return


def select_split_rows(
    split: Split, rows: npt.NDArray[np.int64], new_labels_of_rows: npt.NDArray[np.int32], listing_digest: str
) -> Split:
    """Return some rows of a split with known labels, in shards of ``BLOCK_ROWS`` samples.

    Parameters
    ----------
    rows : ndarray of int64, shape (n,)
        Ascending.
    new_labels_of_rows : ndarray of int32, shape (n,)
        Labels of these rows in the new split.
    listing_digest : str
        See `Split`.
    """

    def make_shard(start: int) -> Shard:
        own_rows = rows[start : start + BLOCK_ROWS]
        return Shard(
            f"samples {own_rows[0]} to {own_rows[-1]} of {split.shards[0].location} …",
            new_labels_of_rows[start : start + BLOCK_ROWS],
            lambda positions: split.iter_samples(own_rows if positions is None else own_rows[positions]),
        )

    return Split(tuple(make_shard(start) for start in range(0, len(rows), BLOCK_ROWS)), listing_digest)
