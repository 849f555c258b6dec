"""Class ids in one spelling: readable text, in one Unicode normal form, whatever system named the folders."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.source import Sample, SampleFile, Shard, Source, Split
from sfm.stats_store.class_lists import normalize_class_id
from sfm.text import utf8_only


def with_normal_ids(source: Source) -> Source:
    """Return a source whose class ids are UTF-8, in normal form C.

    So a class folder that macOS named and one that Linux named are one class, with one fingerprint. Two such
    folders in one split stay two classes, which are refused as written differently only.

    Raises
    ------
    InputError
        If an id is not UTF-8; names it.
    """
    ids = source.class_ids
    if ids is None:
        return source
    for class_id in ids:
        if utf8_only(class_id) != class_id:
            raise InputError(
                f"{source.spec} has a class whose name is not UTF-8: {utf8_only(class_id)}; rename it"
            )
    normal = {class_id: normalize_class_id(class_id) for class_id in ids}
    if all(old == new for old, new in normal.items()) or is_ambiguous(source, normal):
        return source
    new_ids = sorted(set(normal.values()))
    names = dict(zip(map(normal.__getitem__, ids), source.class_names or ids, strict=True))
    place = {class_id: c for c, class_id in enumerate(new_ids)}
    index = np.array([place[normal[class_id]] for class_id in ids], dtype=np.int32)

    def renamed(split: Split) -> Split:
        return replace(split, shards=tuple(rename_labels(shard, index, normal) for shard in split.shards))

    return replace(
        source,
        class_ids=new_ids,
        class_names=None if source.class_names is None else [names[class_id] for class_id in new_ids],
        train=renamed(source.train),
        test=renamed(source.test),
    )


def is_ambiguous(source: Source, normal: Mapping[str, str]) -> bool:
    """Say whether a split has samples of two classes that would become one."""
    assert source.class_ids is not None
    for labels in (source.labels or {}).values():
        met = [normal[source.class_ids[c]] for c in np.unique(labels).tolist()]
        if len(set(met)) < len(met):
            return True
    return source.labels is None and len(set(normal.values())) < len(normal)


def rename_labels(shard: Shard, index: npt.NDArray[np.int32], normal: Mapping[str, str]) -> Shard:
    """Return a shard whose labels and samples name their classes otherwise."""

    def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
        for sample in shard.read(positions):
            yield replace(sample, label=normal.get(sample.label, sample.label))

    labels = None if shard.labels is None else index[shard.labels]
    return replace(shard, labels=labels, read=read)
