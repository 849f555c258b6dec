"""Sources of some of the classes, and splits of some of the rows, of others."""

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
from sfm.stats_store.digest import BLOCK_ROWS
from sfm.text import format_names

OTHER_CLASSES_KIND = "images of other classes"

T = TypeVar("T")


def select_classes(
    source: Source, class_ids: Sequence[str], class_names: Sequence[str] | None = None
) -> Source:
    """Return a source of some of its classes only; samples of others are not decoded.

    Where labels are known, nothing is read of other classes; elsewhere their samples are read and dropped.

    Parameters
    ----------
    class_ids : sequence of str
        In any order.
    class_names : sequence of str, optional
        What people call them, in the order of `class_ids`; by default as in the source.

    Raises
    ------
    InputError
        If the source is known not to have one of them, or one is given twice.
    """
    ids = sorted(class_ids)
    twice = sorted({a for a, b in pairwise(ids) if a == b})
    if twice:
        raise InputError(f"the class list for {source.spec} names {format_names(twice)} twice")
    if class_names is not None:
        name_of = dict(zip(class_ids, class_names, strict=True))
    else:
        name_of = dict(zip(source.class_ids or (), source.class_names or source.class_ids or (), strict=True))
    if source.class_ids is not None:
        absent = [class_id for class_id in ids if class_id not in set(source.class_ids)]
        if absent:
            close = difflib.get_close_matches(absent[0], source.class_ids, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise InputError(f"{source.spec} has no class {format_names(absent)}{hint}")
    wanted, place = "\n".join(ids), {class_id: c for c, class_id in enumerate(ids)}
    others = 0

    def part(split: Split) -> Split:
        labels, listing = split.labels, compute_digest(split.listing, wanted)
        if labels is None:
            return Split(tuple(filter_shard(shard, place.keys()) for shard in split.shards), listing)
        assert source.class_ids is not None
        index = np.array([place.get(class_id, -1) for class_id in source.class_ids], dtype=np.int32)
        rows = np.flatnonzero(index[labels] >= 0)
        nonlocal others
        others += len(labels) - len(rows)
        return select_rows(split, rows, index[labels[rows]], listing)

    train, test = part(source.train), part(source.test) if source.test.shards else source.test
    return replace(
        source,
        class_ids=ids,
        class_names=[name_of.get(class_id, class_id) for class_id in ids],
        train=train,
        test=test,
        inventory=source.inventory.with_unused(OTHER_CLASSES_KIND, others),
    )


def filter_shard(shard: Shard, class_ids: Collection[str]) -> Shard:
    """Return a shard that drops samples of other classes while they are read; positions count the rest."""

    def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
        shard.unused[OTHER_CLASSES_KIND] = 0
        kept = (sample for sample in shard.read(None) if keep(sample))
        return kept if positions is None else take_positions(kept, positions)

    def keep(sample: Sample | SampleFile) -> bool:
        if sample.label in class_ids:
            return True
        shard.unused[OTHER_CLASSES_KIND] += 1
        return False

    return replace(shard, read=read)


def take_positions(samples: Iterator[T], positions: npt.NDArray[np.int64]) -> Iterator[T]:
    """Yield the samples at ascending positions of a stream, and read no further than the last."""
    wanted = iter(positions.tolist())
    target = next(wanted, None)
    for position, sample in enumerate(samples):
        if position == target:
            yield sample
            target = next(wanted, None)
        if target is None:
            return


def select_rows(
    split: Split, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], listing: str
) -> Split:
    """Return a split of some samples of another whose labels are known, in shards of ``BLOCK_ROWS``."""

    def shard(start: int) -> Shard:
        own = rows[start : start + BLOCK_ROWS]
        return Shard(
            f"samples {own[0]} to {own[-1]} of {split.shards[0].where} …",
            labels[start : start + BLOCK_ROWS],
            lambda positions: split.iter_samples(own if positions is None else own[positions]),
        )

    return Split(tuple(shard(start) for start in range(0, len(rows), BLOCK_ROWS)), listing)
