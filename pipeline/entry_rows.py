"""Which rows make up an entry: the whole dataset, or a training split divided for tuning."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.file_counts import count_files
from sfm.pipeline.fingerprint import FingerprintBuilder
from sfm.pipeline.hold_out import make_hold_out_keys, mark_held_out_rows
from sfm.pipeline.pixel_marks import MarkCount, count_marks, find_marked_rows
from sfm.pipeline.selection import UNUSED_LABEL, SampleSelection, select_samples
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.class_labels import require_consistent_labels
from sfm.pipeline.sources.limits import require_storable_classes
from sfm.pipeline.staging import PartitionTask, StagedFeatures, StagedPartition, Staging, TaskResult
from sfm.random_streams import make_rng
from sfm.stats_store.cards import FileCounts
from sfm.text import escape_non_utf8, format_names

EntryRole = Literal["full", "tuning"]


@dataclass(frozen=True)
class EntryRows:
    """The rows of one entry.

    Attributes
    ----------
    role : {"full", "tuning"}
    train, test : list of Partition
        Where training rows and held-out rows lie.
    train_rows, test_rows : ndarray of bool
        Which rows of those partitions belong.
    train_bytes : int
        Encoded bytes of the training samples.
    fingerprint : str
        Of the samples used, by split.
    marked : dict of str to Marked
        By mark, see `sfm.pipeline.staging.IMAGE_MARKS`: how many of these rows have it.
    """

    role: EntryRole
    train: list[StagedPartition]
    test: list[StagedPartition]
    train_rows: npt.NDArray[np.bool_]
    test_rows: npt.NDArray[np.bool_]
    train_bytes: int
    fingerprint: str
    marked: dict[str, MarkCount]

    def staged_train(self, staging: Staging, backbone: str) -> StagedFeatures:
        """Return the training features through a backbone, given by its hash."""
        return staging.staged(backbone, self.train).only(self.train_rows)

    def staged_test(self, staging: Staging, backbone: str) -> StagedFeatures:
        """Return the held-out features through a backbone, given by its hash."""
        return staging.staged(backbone, self.test).only(self.test_rows)


def list_roles(config: ExtractConfig) -> list[EntryRole]:
    """Return the roles of the entries that are asked for."""
    return ["full", "tuning"] if config.tune_fraction else ["full"]


def make_entry_options(config: ExtractConfig, role: EntryRole, rendering: dict[str, Any]) -> dict[str, Any]:
    """Return everything besides backbone and data that shapes an entry's arrays; its digest is in the key.

    Parameters
    ----------
    rendering : dict
        As :func:`sfm.pipeline.pixel_marks.make_rendering_options` gives it.
    """
    options = {
        "origin": "extracted",
        "role": role,
        "sub_classes": list(config.sub_classes),
        "exemplars": config.exemplars,
        "keep_train_features": config.keep_train_features,
        "no_held_out": config.no_held_out,
        "limit_per_class": config.limit_per_class,
        "tune_fraction": config.tune_fraction if role == "tuning" else None,
        "seed": config.seed,
        "precision": config.precision,
        "views": 1 + config.views,
        **rendering,
    }
    return options if config.hold_out is None else options | {"hold_out": config.hold_out}


def iterate_digests(staging: Staging, work: Sequence[StagedPartition]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the sample digests of partitions, one array of shape (n, 32) each."""
    for partition in work:
        yield staging.digests(partition)


def read_digests(
    staging: Staging, work: Sequence[StagedPartition], rows: npt.NDArray[np.intp]
) -> npt.NDArray[np.uint8]:
    """Return the sample digests of some rows of partitions, of any shape (…): shape (…, 32)."""
    found = np.zeros((*rows.shape, 32), dtype=np.uint8)
    start = 0
    for digests in iterate_digests(staging, work):
        here = (rows >= start) & (rows < start + len(digests))
        found[here] = digests[rows[here] - start]
        start += len(digests)
    return found


@dataclass(frozen=True)
class PassResult:
    """What a pass over all tasks found.

    Attributes
    ----------
    selection : Selection
        The samples that make up the entries.
    partitions : list of Partition
        Where their features are.
    sizes : dict of str to list of int
        Samples per shard, by split.
    skipped : list of str
        Samples that could not be decoded: where each is, and why.
    files : FileCounts
        What became of the files of the dataset.
    """

    selection: SampleSelection
    partitions: list[StagedPartition]
    sizes: dict[str, list[int]]
    skipped: list[str]
    files: FileCounts


def collect_pass_result(
    config: ExtractConfig, source: Source, tasks: Sequence[PartitionTask], staging: Staging
) -> PassResult:
    """Put together what the tasks of a pass found, and choose the samples that make up the entries.

    Raises
    ------
    InputError
        If a sample could not be decoded and is not to be skipped, or the classes cannot be distilled.
    """
    found = {task.name: staging.found(task) for task in tasks}
    told = [(task, own) for task in tasks if (own := found[task.name]) is not None]
    gone = next((task.name for task in tasks if found[task.name] is None), None)
    if gone is not None:
        raise InputError(f"unfinished work in {staging.root}, {gone}, is damaged or gone: run again")
    skipped = [escape_non_utf8(f"{s.where}: {s.why}") for _, own in told for s in own.skipped]
    if skipped and config.on_error == "fail":
        raise InputError(f"cannot decode {skipped[0]}; repair or remove it, or use --on-error skip")
    rows = compute_positions(source, told)
    known = source.labels
    if known is None:
        class_ids, labels = collect_classes(source, told)
        sizes = {name: [own.read for task, own in told if task.split == name] for name in source.splits}
    else:
        class_ids, labels = source.class_ids or [], known
        sizes = {
            name: [0 if shard.labels is None else len(shard.labels) for shard in split.shards]
            for name, split in source.splits.items()
        }
    none = np.zeros(0, dtype=np.int64)
    unreadable = {
        name: np.concatenate(
            [none, *(rows[t.name][[s.place for s in own.skipped]] for t, own in told if t.split == name)]
        )
        for name in source.splits
    }
    selection = select_samples(config, class_ids, source.class_names, labels, unreadable)
    beside = Counter(source.inventory.unused)
    for _, own in told:
        beside.update(own.unused)
    partitions = []
    for task, own in told:
        samples = rows[task.name][own.kept]
        own_labels = selection.labels[task.split][samples]
        partitions.append(
            StagedPartition(task.split, task.number, samples, own_labels, find_marked_rows(own), own.examples)
        )
    files = count_files(class_ids, labels, selection, unreadable, beside)
    return PassResult(selection, partitions, sizes, skipped, files)


def compute_positions(
    source: Source, told: Sequence[tuple[PartitionTask, TaskResult]]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return, by task, the positions in the split of the samples that were read."""
    start = dict.fromkeys(source.splits, 0)
    rows = {}
    for task, found in told:
        rows[task.name] = start[task.split] + np.arange(found.read) if task.rows is None else task.rows
        start[task.split] += found.read
    return rows


def collect_classes(
    source: Source, told: Sequence[tuple[PartitionTask, TaskResult]]
) -> tuple[list[str], dict[str, npt.NDArray[np.int32]]]:
    """Return the classes of a source whose labels came with its samples, and all labels, by split.

    Raises
    ------
    InputError
        If samples are of classes that the source does not name, the splits hold different classes, or a
        class is written in two ways.
    """
    require_consistent_labels(
        source.spec,
        [
            (label, text)
            for _, own in told
            for label, texts in zip(own.classes, own.written, strict=False)
            for text in texts
        ],
    )
    met = {
        name: {label for task, own in told if task.split == name for label in own.classes}
        for name in source.splits
    }
    if source.class_ids is None:
        odd = sorted(met["train"] ^ met["test"])
        if odd and source.test.shards:
            raise InputError(
                f"the training and the held-out split of {source.spec} hold different classes: "
                f"{format_names(odd)} in one only"
            )
        class_ids = sorted(met["train"])
        require_storable_classes(class_ids, None, source.spec)
    else:
        class_ids = source.class_ids
        unknown = sorted((met["train"] | met["test"]) - set(class_ids))
        if unknown:
            raise InputError(
                f"{source.spec} has samples of classes that it does not name: {format_names(unknown)}"
            )
    index = {class_id: c for c, class_id in enumerate(class_ids)}
    labels = {}
    for name in source.splits:
        parts = [
            np.array([index[label] for label in own.classes], dtype=np.int32)[own.labels]
            for task, own in told
            if task.split == name and own.read
        ]
        labels[name] = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
    return class_ids, labels


def select_entry_rows(config: ExtractConfig, gathered: PassResult, staging: Staging) -> list[EntryRows]:
    """Decide which staged rows make up each entry that is asked for, and fingerprint them."""
    train = [p for p in gathered.partitions if p.split == "train"]
    test = [p for p in gathered.partitions if p.split == "test"]
    labels = np.concatenate([p.labels for p in train])
    class_ids = gathered.selection.class_ids
    sizes = np.concatenate([staging.sizes(partition) for partition in train])
    in_use = labels != UNUSED_LABEL
    if config.hold_out is None:
        held_out = np.concatenate([p.labels for p in test]) != UNUSED_LABEL
        tally = FingerprintBuilder()
        for partition, digests in zip(
            (*train, *test), iterate_digests(staging, (*train, *test)), strict=True
        ):
            rows = partition.labels != UNUSED_LABEL
            tally.add(partition.split, class_ids, partition.labels[rows], digests[rows])
        every = int(sizes[in_use].sum())
        marked = count_marks([(train, in_use), (test, held_out)])
        parts = [EntryRows("full", train, test, in_use, held_out, every, tally.fingerprint(), marked)]
    else:
        keys = np.concatenate(
            [make_hold_out_keys(digests, config.seed) for digests in iterate_digests(staging, train)]
        )
        held_out = mark_held_out_rows(labels, keys, class_ids, config.hold_out)
        parts = [split_training_rows("full", train, in_use & ~held_out, held_out, class_ids, sizes, staging)]
        labels, in_use = np.where(held_out, UNUSED_LABEL, labels).astype(np.int32), in_use & ~held_out
    if config.tune_fraction is not None:
        held = draw_held_out_rows(labels, class_ids, config.tune_fraction, config.seed)
        parts.append(split_training_rows("tuning", train, in_use & ~held, held, class_ids, sizes, staging))
    return parts


def split_training_rows(
    role: EntryRole,
    train: list[StagedPartition],
    kept: npt.NDArray[np.bool_],
    held: npt.NDArray[np.bool_],
    class_ids: Sequence[str],
    sizes: npt.NDArray[np.int64],
    staging: Staging,
) -> EntryRows:
    """Return the part whose training and held-out rows both come from the training split.

    Parameters
    ----------
    kept, held : ndarray of bool, shape (n,)
        Which rows are for training, and which are held out.
    sizes : ndarray of int64, shape (n,)
        Encoded bytes of the samples.
    """
    tally, start = FingerprintBuilder(), 0
    for partition, digests in zip(train, iterate_digests(staging, train), strict=True):
        here = slice(start, start + len(partition.labels))
        start = here.stop
        for split, rows in (("train", kept[here]), ("test", held[here])):
            tally.add(split, class_ids, partition.labels[rows], digests[rows])
    marked = count_marks([(train, kept | held)])
    return EntryRows(role, train, train, kept, held, int(sizes[kept].sum()), tally.fingerprint(), marked)


def draw_held_out_rows(
    labels: npt.NDArray[np.int32], class_ids: Sequence[str], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Mark a random fraction of every class, at least one sample and not all.

    Raises
    ------
    InputError
        If a class has a single sample.
    """
    held = np.zeros(len(labels), dtype=bool)
    for c, class_id in enumerate(class_ids):
        own = np.flatnonzero(labels == c)
        if len(own) < 2:
            raise InputError(f"class {class_id} has one training image; --tune-fraction needs two or more")
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        held[make_rng(seed, 4, c).permutation(own)[:count]] = True
    return held
