"""Normalise class ids to Unicode normal form C, because systems name folders differently."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.sources.source import Shard, Source, Split
from sfm.stats_store.class_lists import normalize_class_id
from sfm.text import escape_non_utf8


def normalize_source_class_ids(source: Source) -> Source:
    """Return a source whose class ids are UTF-8 and in normal form C.

    A class folder that macOS named and one that Linux named are then one class, with one fingerprint. Two
    such folders in one split stay two classes, which `require_distillable_classes` refuses.

    Raises
    ------
    InputError
        If an id is not UTF-8; names it.
    """
    ids = source.class_ids
    if ids is None:
        return source
    for class_id in ids:
        if escape_non_utf8(class_id) != class_id:
            raise InputError(
                f"{source.spec} has a class whose name is not UTF-8: {escape_non_utf8(class_id)}; rename it"
            )
    normal_by_id = {class_id: normalize_class_id(class_id) for class_id in ids}
    if all(old == new for old, new in normal_by_id.items()) or has_samples_of_colliding_ids(
        source, normal_by_id
    ):
        return source
    new_ids = sorted(set(normal_by_id.values()))
    names = dict(zip(map(normal_by_id.__getitem__, ids), source.class_names or ids, strict=True))
    label_by_id = {class_id: label for label, class_id in enumerate(new_ids)}
    new_labels = np.array([label_by_id[normal_by_id[class_id]] for class_id in ids], dtype=np.int32)

    def relabel_split(split: Split) -> Split:
        shards = (replace_shard_class_ids(shard, new_labels, normal_by_id) for shard in split.shards)
        return replace(split, shards=tuple(shards))

    return replace(
        source,
        class_ids=new_ids,
        class_names=None if source.class_names is None else [names[class_id] for class_id in new_ids],
        train=relabel_split(source.train),
        test=relabel_split(source.test),
    )


def has_samples_of_colliding_ids(source: Source, normalized_id_by_id: Mapping[str, str]) -> bool:
    """Return whether a split has samples of two classes whose normal forms are equal."""
    assert source.class_ids is not None
    for labels in (source.labels or {}).values():
        used_ids = [normalized_id_by_id[source.class_ids[label]] for label in np.unique(labels).tolist()]
        if len(set(used_ids)) < len(used_ids):
            return True
    return source.labels is None and len(set(normalized_id_by_id.values())) < len(normalized_id_by_id)


def replace_shard_class_ids(
    shard: Shard, new_label_by_label: npt.NDArray[np.int32], new_id_by_id: Mapping[str, str]
) -> Shard:
    """Return a shard with new labels, by old label, and samples with new class ids, by old class id."""

    def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
        for sample in shard.read(positions):
            yield replace(sample, class_id=new_id_by_id.get(sample.class_id, sample.class_id))

    labels = None if shard.labels is None else new_label_by_label[shard.labels]
    return replace(shard, labels=labels, read=read)
