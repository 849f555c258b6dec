"""The pass over the raw images: decode each once, compute features with every backbone, and stage them."""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback
from sfm.pipeline.batch_features import BatchFeatures, PassOptions, compute_batch_features
from sfm.pipeline.decoding import SampleBatch, merge_image_mark_locations
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.runtime import BATCH_IMAGES, ExtractionRuntime, one_torch_thread
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.class_labels import require_one_spelling_per_class
from sfm.pipeline.sources.limits import MAX_BATCH_BYTES, MAX_QUEUED_BYTES
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.staging import Staging
from sfm.pipeline.task_results import TaskResult
from sfm.text import escape_non_utf8

MAX_PENDING_BATCHES = 8
"""Maximum number of pending batches: enough to keep threads busy while files are written."""


@dataclass(frozen=True)
class PassIncrement:
    """Work that was done since the last report of a pass.

    Attributes
    ----------
    image_count : int
        Images that were decoded or skipped.
    skipped_count : int
        Images that cannot be decoded.
    completed_partitions : int
        Partitions that were completed: 0 or 1.
    thread_seconds_by_stage : dict of str to float
        Time in one thread, by ``"decode"`` and the backbones' specs.
    """

    image_count: int = 0
    skipped_count: int = 0
    completed_partitions: int = 0
    thread_seconds_by_stage: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PassSummary:
    """Cost of a whole pass.

    Attributes
    ----------
    images_read, images_resumed : int
        Images decoded in this pass, and images whose features were staged before.
    seconds : float
    """

    images_read: int
    images_resumed: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images decoded per second of the pass; 0 if all were staged before."""
        return self.images_read / self.seconds if self.images_read else 0.0


def iterate_batches(
    source: Source,
    task: PartitionTask,
    runtime: ExtractionRuntime,
    batch_size: int,
    max_class_samples_per_shard: int | None,
    labels_and_spellings_to_fill: list[tuple[str, str]],
) -> Iterator[list[tuple[int, Sample | SampleFile]]]:
    """Yield the samples of a task in batches, each with its index; batches never span tasks.

    Parameters
    ----------
    runtime : ExtractionRuntime
        Reads the files, or leaves that to its decoder.
    max_class_samples_per_shard : int or None
        Maximum number of samples of a class to yield, if labels are not known.
    labels_and_spellings_to_fill : list of (str, str)
        Gets the label of every sample that is listed, and its spelling.

    Raises
    ------
    InputError
        If there are fewer samples than listed.
    """
    batch: list[tuple[int, Sample | SampleFile]] = []
    class_counts: Counter[str] = Counter()
    for index, sample in enumerate(runtime.load_samples(task.iterate_samples(source))):
        labels_and_spellings_to_fill.append(
            (sample.class_id, sample.numeric_label_text if isinstance(sample, Sample) else "")
        )
        class_counts[sample.class_id] += 1
        if (
            task.positions_in_split is not None
            or max_class_samples_per_shard is None
            or class_counts[sample.class_id] <= max_class_samples_per_shard
        ):
            batch.append((index, sample))
        # The composition of a batch may affect rounding, so it depends on the images only.
        if len(batch) == batch_size or count_encoded_bytes(batch) > MAX_BATCH_BYTES:
            yield batch
            batch = []
    if task.positions_in_split is not None and len(labels_and_spellings_to_fill) != len(
        task.positions_in_split
    ):
        raise InputError(
            f"{source.spec} shrank while it was read: {len(labels_and_spellings_to_fill)} of "
            f"{len(task.positions_in_split)} samples of partition {task.name} are there; run again"
        )
    if batch:
        yield batch


def count_encoded_bytes(batch: SampleBatch) -> int:
    """Return the size of the encoded images that a batch holds; files that are not read yet hold none."""
    return sum(len(sample.data) for _, sample in batch if isinstance(sample, Sample))


def find_unstaged_backbones_unless_complete(
    task: PartitionTask, backbones: Collection[Backbone], staging: Staging, options: PassOptions
) -> list[Backbone] | None:
    """Return the backbones whose features of a task are not staged; None if the task is complete."""
    result = staging.read_result(task)
    if result is None:
        return list(backbones)
    rows = len(result.kept)
    missing = [
        backbone
        for backbone in backbones
        if not all(
            staging.has_valid_array(name, task, np.float32, rows, (backbone.card.features,))
            for name in options.list_feature_array_names(backbone.card.hash, task.split)
        )
    ]
    has_sizes = staging.has_valid_array("sizes", task, np.int64, rows, ())
    has_digests = staging.has_valid_array("digests", task, np.uint8, rows, (32,))
    return None if has_sizes and has_digests and not missing else missing


class InFlightBatchQueue:
    """Batches whose features are computed, each task's result after its batches; all finish in order.

    Parameters
    ----------
    max_length : int
        Longest queue before work has to finish.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._pending: deque[Future[BatchFeatures] | Callable[[Sequence[BatchFeatures]], None]] = deque()
        self._encoded_bytes: deque[int] = deque()  # of the pending batches
        self._finished: list[BatchFeatures] = []  # batches of the current task

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add_batch(self, future: Future[BatchFeatures], encoded_bytes: int) -> None:
        """Append a batch of a number of encoded bytes."""
        self._pending.append(future)
        self._encoded_bytes.append(encoded_bytes)

    def add_task(self, write_task: Callable[[Sequence[BatchFeatures]], None]) -> None:
        """Append a function that saves a task, given its batches."""
        self._pending.append(write_task)

    def is_full(self) -> bool:
        """Return whether the queue is too long, or holds too many encoded bytes."""
        return len(self._pending) > self.max_length or sum(self._encoded_bytes) > MAX_QUEUED_BYTES

    def finish_next(self) -> PassIncrement:
        """Wait for the first batch, or save the first task."""
        work = self._pending.popleft()
        if isinstance(work, Future):
            self._encoded_bytes.popleft()
            self._finished.append(batch := work.result())
            return PassIncrement(
                len(batch.kept_indices_in_task) + len(batch.skipped),
                len(batch.skipped),
                0,
                batch.thread_seconds_by_stage,
            )
        work(self._finished)
        self._finished.clear()
        return PassIncrement(completed_partitions=1)

    def cancel_unstarted_batches(self) -> None:
        """Cancel the batches that have not started."""
        for work in self._pending:
            if isinstance(work, Future):
                work.cancel()


def stage_tasks(
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones: Sequence[Backbone],
    staging: Staging,
    options: PassOptions,
    runtime: ExtractionRuntime,
) -> Generator[PassIncrement, None, None]:
    """Read tasks and stage what is missing of each, in this process.

    The result of a task is written last and makes it complete; an interrupted task is read again.

    Parameters
    ----------
    backbones : sequence of Backbone
        As :func:`~sfm.pipeline.runtime.optimize_for_inference` returns them.
    runtime : ExtractionRuntime

    Raises
    ------
    InputError
        If images cannot be read or decoded, or give features that are not finite.
    IncompleteExtractionError
        If a decoding process is lost.
    """
    size, limit = BATCH_IMAGES[backbones[0].device.type], options.max_class_samples_per_shard
    queue = InFlightBatchQueue(2 * runtime.max_batches_in_flight + MAX_PENDING_BATCHES)
    threads = ThreadPoolExecutor(runtime.max_batches_in_flight, thread_name_prefix="features")
    with one_torch_thread(), tf32_disabled(), threads as pool:
        try:
            for task in tasks:
                missing = find_unstaged_backbones_unless_complete(task, backbones, staging, options)
                if missing is None:
                    continue
                labels: list[tuple[str, str]] = []
                for batch in iterate_batches(source, task, runtime, size, limit, labels):
                    future = pool.submit(compute_batch_features, batch, task.split, runtime, missing, options)
                    queue.add_batch(future, count_encoded_bytes(batch))
                    while queue.is_full():
                        yield queue.finish_next()
                unused = (
                    {} if task.positions_in_split is not None else dict(task.get_shard(source).unused_by_kind)
                )
                queue.add_task(
                    partial(write_task_files, staging, task, source, missing, options, labels, unused)
                )
                while queue.is_full():
                    yield queue.finish_next()
            while queue:
                yield queue.finish_next()
        finally:
            queue.cancel_unstarted_batches()


def write_task_files(
    staging: Staging,
    task: PartitionTask,
    source: Source,
    backbones: Sequence[Backbone],
    options: PassOptions,
    labels_and_spellings: Sequence[tuple[str, str]],
    unused_file_counts_by_kind: dict[str, int],
    feature_batches: Sequence[BatchFeatures],
) -> None:
    """Stage the arrays and the result of a task.

    Parameters
    ----------
    unused_file_counts_by_kind : dict of str to int
        Number of other files, by kind.

    Raises
    ------
    InputError
        If its samples differ from an earlier pass, or a class is spelled in two ways.
    """
    require_one_spelling_per_class(source.spec, labels_and_spellings)
    digests = np.concatenate(
        [np.zeros((0, 32), dtype=np.uint8), *(batch.sample_digests for batch in feature_batches)]
    )
    if staging.differs_from_staged_digests(task, digests):
        staging.delete_task_files(task)
        raise InputError(
            f"images of {source.spec} changed between two runs of this extraction, in partition {task.name}: "
            f"run again"
        )
    for card in (backbone.card for backbone in backbones):
        empty = np.zeros((0, card.features), dtype=np.float32)
        for name in options.list_feature_array_names(card.hash, task.split):
            rows = np.concatenate([empty, *(batch.features_by_array_name[name] for batch in feature_batches)])
            staging.write_array(name, task, rows)
    sizes = np.array(
        [size for batch in feature_batches for size in batch.encoded_bytes_per_sample], dtype=np.int64
    )
    staging.write_array("sizes", task, sizes)
    staging.write_array("digests", task, digests)
    staging.write_result(
        task, make_task_result(task, labels_and_spellings, unused_file_counts_by_kind, feature_batches)
    )


def make_task_result(
    task: PartitionTask,
    labels_and_spellings: Sequence[tuple[str, str]],
    unused_file_counts_by_kind: dict[str, int],
    feature_batches: Sequence[BatchFeatures],
) -> TaskResult:
    """Return the result of a task, from its labels and batches; see :func:`write_task_files`."""
    known = task.positions_in_split is not None
    marked = merge_image_mark_locations(batch.image_mark_locations for batch in feature_batches)
    spellings: dict[str, set[str]] = {label: set() for label, _ in labels_and_spellings}
    for label, text in set(labels_and_spellings):
        spellings[label].add(text)
    classes = {label: index for index, label in enumerate(spellings)}
    return TaskResult(
        read=len(labels_and_spellings),
        kept=[index for batch in feature_batches for index in batch.kept_indices_in_task],
        skipped=[skipped for batch in feature_batches for skipped in batch.skipped],
        classes=[] if known else list(classes),
        labels=[] if known else [classes[label] for label, _ in labels_and_spellings],
        written=[] if known else [sorted(texts) for texts in spellings.values()],
        marked={mark: sorted(samples) for mark, samples in marked.items()},
        # File names may not be valid UTF-8, but JSON must be.
        examples={mark: escape_non_utf8(samples[min(samples)]) for mark, samples in marked.items()},
        unused=unused_file_counts_by_kind,
    )


def run_and_track_pass(
    pass_increments: Iterator[PassIncrement],
    tasks: Sequence[PartitionTask],
    pending_tasks: Sequence[PartitionTask],
    staging: Staging,
    progress: ProgressCallback,
) -> PassSummary:
    """Run a pass to its end, report its progress, and return its cost.

    Progress is in partitions if the number of images is not known.

    Parameters
    ----------
    pass_increments : iterator of PassIncrement
        As :func:`stage_tasks` yields them.
    tasks, pending_tasks : sequence of PartitionTask
        All tasks, and those that were not complete before.
    """
    began = time.perf_counter()
    pending = {task.name for task in pending_tasks}
    resumed = [result for task in tasks if task.name not in pending and (result := staging.read_result(task))]
    images_resumed = sum(len(result.kept) + len(result.skipped) for result in resumed)
    sizes = [len(task.positions_in_split) for task in tasks if task.positions_in_split is not None]
    by_images = len(sizes) == len(tasks)
    total, unit = (sum(sizes), "images") if by_images else (len(tasks), "partitions")
    images = skipped = partitions = 0
    seconds_by_stage: Counter[str] = Counter()

    def report_progress() -> None:
        seconds = time.perf_counter() - began
        done = images_resumed + images if by_images else len(resumed) + partitions
        figures = {"images/s": images / seconds if images else 0.0}
        figures["partitions left"] = len(tasks) - len(resumed) - partitions
        if skipped:
            figures["skipped"] = skipped
        figures |= {f"{stage} ms": 1e3 * s / images for stage, s in seconds_by_stage.items() if images}
        progress(Progress("features", min(done, total), total, unit, figures))

    report_progress()
    for step in pass_increments:
        images, skipped = images + step.image_count, skipped + step.skipped_count
        partitions += step.completed_partitions
        seconds_by_stage.update(step.thread_seconds_by_stage)
        report_progress()
    return PassSummary(images, images_resumed, time.perf_counter() - began)
