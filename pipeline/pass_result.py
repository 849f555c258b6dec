"""Collect the results of all tasks of a pass, and select the samples that make up the entries."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.file_counts import count_used_and_unused_files
from sfm.pipeline.image_marks import make_masks_by_image_mark
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.selection import SampleSelection, select_samples
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.class_labels import require_one_spelling_per_class
from sfm.pipeline.sources.limits import require_class_names_within_limits
from sfm.pipeline.staged_features import StagedPartition
from sfm.pipeline.staging import Staging
from sfm.pipeline.task_results import TaskResult
from sfm.stats_store.cards import FileCounts
from sfm.text import escape_non_utf8, format_names

TasksWithResults = Sequence[tuple[PartitionTask, TaskResult]]


@dataclass(frozen=True)
class PassResult:
    """The result of a pass over all tasks.

    Attributes
    ----------
    selection : SampleSelection
        Samples that make up the entries.
    partitions : list of StagedPartition
        Staged partitions that hold their features.
    shard_sizes_by_split : dict of str to list of int
        Samples per shard.
    skipped_lines : list of str
        Samples that could not be decoded: location and reason.
    file_counts : FileCounts
        Used and unused files of the dataset.
    """

    selection: SampleSelection
    partitions: list[StagedPartition]
    shard_sizes_by_split: dict[str, list[int]]
    skipped_lines: list[str]
    file_counts: FileCounts


def collect_pass_result(
    config: ExtractConfig, source: Source, tasks: Sequence[PartitionTask], staging: Staging
) -> PassResult:
    """Read the results of all tasks, and select the samples that make up the entries.

    Raises
    ------
    InputError
        If a sample could not be decoded with on_error="fail", or the classes cannot be distilled.
    """
    results = read_task_results(tasks, staging)
    skipped = [escape_non_utf8(f"{s.where}: {s.why}") for _, result in results for s in result.skipped]
    if skipped and config.on_error == "fail":
        raise InputError(f"cannot decode {skipped[0]}; repair or remove it, or use --on-error skip")
    positions = compute_sample_positions_by_task(source, results)
    if source.labels is None:
        class_ids, labels = collect_class_ids_and_labels_by_split(source, results)
        shard_sizes = {
            name: [result.read for task, result in results if task.split == name] for name in source.splits
        }
    else:
        class_ids, labels = source.class_ids or [], source.labels
        shard_sizes = {
            name: [0 if shard.labels is None else len(shard.labels) for shard in split.shards]
            for name, split in source.splits.items()
        }
    undecodable = {
        name: np.concatenate(
            [
                np.zeros(0, dtype=np.int64),
                *(
                    positions[task.name][[s.place for s in result.skipped]]
                    for task, result in results
                    if task.split == name
                ),
            ]
        )
        for name in source.splits
    }
    selection = select_samples(config, class_ids, source.class_names, labels, undecodable)
    unused = Counter(source.inventory.unused_by_kind)
    for _, result in results:
        unused.update(result.unused)
    partitions = []
    for task, result in results:
        samples = positions[task.name][result.kept]
        kept_labels = selection.labels_by_split[task.split][samples]
        marked = make_masks_by_image_mark(result)
        partitions.append(
            StagedPartition(task.split, task.number, samples, kept_labels, marked, result.examples)
        )
    files = count_used_and_unused_files(class_ids, labels, selection, undecodable, unused)
    return PassResult(selection, partitions, shard_sizes, skipped, files)


def read_task_results(tasks: Sequence[PartitionTask], staging: Staging) -> TasksWithResults:
    """Return all tasks with their results.

    Raises
    ------
    InputError
        If a task is not complete, or its result is damaged; names it.
    """
    results = []
    for task in tasks:
        result = staging.read_result(task)
        if result is None:
            raise InputError(f"unfinished work in {staging.root}, {task.name}, is damaged or gone: run again")
        results.append((task, result))
    return results


def compute_sample_positions_by_task(
    source: Source, results: TasksWithResults
) -> dict[str, npt.NDArray[np.int64]]:
    """Return, by task, the positions in the split of the samples that were read."""
    start = dict.fromkeys(source.splits, 0)
    positions = {}
    for task, result in results:
        positions[task.name] = (
            start[task.split] + np.arange(result.read)
            if task.positions_in_split is None
            else task.positions_in_split
        )
        start[task.split] += result.read
    return positions


def collect_class_ids_and_labels_by_split(
    source: Source, results: TasksWithResults
) -> tuple[list[str], dict[str, npt.NDArray[np.int32]]]:
    """Return the class ids of a source whose labels came with its samples, and all labels, by split.

    Raises
    ------
    InputError
        If samples are of classes that the source does not name, the splits hold different classes, or a
        class is spelled in two ways.
    """
    require_one_spelling_per_class(
        source.spec,
        [
            (label, text)
            for _, result in results
            for label, texts in zip(result.classes, result.written, strict=False)
            for text in texts
        ],
    )
    classes_by_split = {
        name: {label for task, result in results if task.split == name for label in result.classes}
        for name in source.splits
    }
    if source.class_ids is None:
        different = sorted(classes_by_split["train"] ^ classes_by_split["test"])
        if different and source.test.shards:
            raise InputError(
                f"the training and the held-out split of {source.spec} hold different classes: "
                f"{format_names(different)} in one only"
            )
        class_ids = sorted(classes_by_split["train"])
        require_class_names_within_limits(class_ids, None, source.spec)
    else:
        class_ids = source.class_ids
        unknown = sorted((classes_by_split["train"] | classes_by_split["test"]) - set(class_ids))
        if unknown:
            raise InputError(
                f"{source.spec} has samples of classes that it does not name: {format_names(unknown)}"
            )
    index = {class_id: c for c, class_id in enumerate(class_ids)}
    labels = {}
    for name in source.splits:
        task_labels = [
            np.array([index[label] for label in result.classes], dtype=np.int32)[result.labels]
            for task, result in results
            if task.split == name and result.read
        ]
        labels[name] = np.concatenate([np.zeros(0, dtype=np.int32), *task_labels])
    return class_ids, labels
