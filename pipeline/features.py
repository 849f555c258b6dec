"""The one pass over the raw images: decode once, look through every backbone, stage the features."""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.backbones.execution.modes import ExecutionOption
from sfm.backbones.rendering import Rendering
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback
from sfm.pipeline.decoding import DecodingOptions, SampleBatch, merge_marks
from sfm.pipeline.runtime import BATCH_IMAGES, ExtractionRuntime, one_torch_thread
from sfm.pipeline.sources import Source
from sfm.pipeline.sources.class_labels import require_consistent_labels
from sfm.pipeline.sources.limits import MAX_BATCH_BYTES, MAX_QUEUED_BYTES
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.staging import PartitionTask, SkippedSample, Staging, TaskResult
from sfm.text import escape_non_utf8

MAX_PENDING_BATCHES = 8
"""Batches that wait for a thread, or to be staged: enough work while files are written."""


@dataclass(frozen=True)
class PassOptions:
    """How images are looked at.

    Attributes
    ----------
    limit_per_class : int or None
        Where labels are not known, samples of a class to decode at most, per task.
    on_error : {"fail", "skip"}
    precision : {"float32", "bf16"}
        Of the forward pass; features are float32 in any case.
    views : int
        Augmented views of each training image, besides the image itself.
    seed : int
        Of those views.
    rendering : Rendering
        The source's.
    """

    limit_per_class: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    precision: Literal["float32", "bf16"] = "float32"
    views: int = 0
    seed: int = 0
    rendering: Rendering = field(default=Rendering())
    execution: ExecutionOption = "auto"

    def kinds(self, backbone: str, split: str) -> list[str]:
        """Return what is staged of a split for a backbone (its hash): features, then those of views."""
        views = range(self.views if split == "train" else 0)
        return [backbone, *(f"{backbone}-view-{self.seed}-{view}" for view in views)]


@dataclass(frozen=True)
class PassProgress:
    """A piece of the pass that is done.

    Attributes
    ----------
    images : int
        Decoded.
    skipped : int
        Not decodable.
    partitions : int
        Completed by it: 0 or 1.
    seconds : dict of str to float
        What it took one thread, by ``"decode"`` and the backbones' specs.
    """

    images: int = 0
    skipped: int = 0
    partitions: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PassSummary:
    """What the pass over the images cost.

    Attributes
    ----------
    read, resumed : int
        Images decoded in this pass, and images whose features were staged before.
    seconds : float
    """

    read: int
    resumed: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images decoded per second of the pass; 0 if all were staged before."""
        return self.read / self.seconds if self.read else 0.0


@dataclass(frozen=True)
class BatchFeatures:
    """A batch after all backbones have seen it.

    Attributes
    ----------
    kept : list of int
        Places of its samples in the task.
    digests : ndarray of uint8, shape (n, 32)
    sizes : list of int
        Encoded bytes of its samples.
    features : dict of str to ndarray of float32, shape (n, D)
        By kind, see `PassOptions`.
    skipped : list of Skipped
    seconds : dict of str to float
        As in `PassProgress`.
    marked : dict of str to dict of int to str
        As in `sfm.pipeline.decoding.DecodedBatch`.
    """

    kept: list[int]
    digests: npt.NDArray[np.uint8]
    sizes: list[int]
    features: dict[str, npt.NDArray[np.float32]]
    skipped: list[SkippedSample]
    seconds: dict[str, float]
    marked: dict[str, dict[int, str]] = field(default_factory=dict)


def compute_batch_features(
    batch: SampleBatch,
    split: str,
    equipment: ExtractionRuntime,
    backbones: Sequence[Backbone],
    rules: PassOptions,
) -> BatchFeatures:
    """Decode samples, each once, and compute their features with every backbone.

    Parameters
    ----------
    batch : sequence of (int, Sample or SampleFile)
        With each sample its place in the task.
    split : str
        Where they are from; training images may have views.
    equipment : Equipment

    Raises
    ------
    InputError
        If a sample cannot be read, cannot be decoded and is not to be skipped, or has features that are not
        finite; names it.
    Unfinished
        If a process that decodes is lost.
    """
    preprocessings = tuple(dict.fromkeys(backbone.card.preprocessing for backbone in backbones))
    views = rules.views if split == "train" else 0
    wanted = DecodingOptions(preprocessings, views, rules.seed, rules.on_error, rules.rendering)
    with equipment.decoding(batch, wanted) as decoded:
        seconds = {"decode": decoded.seconds}
        features = {}
        for backbone in backbones:
            for view, kind in enumerate(rules.kinds(backbone.card.hash, split)):
                found = np.zeros((0, backbone.card.features), dtype=np.float32)
                if decoded.kept:
                    pixels = decoded.pixels[backbone.card.preprocessing][view]
                    found, spent = equipment.features(backbone, pixels, rules.precision)
                    seconds[backbone.card.spec] = seconds.get(backbone.card.spec, 0.0) + spent
                require_finite(found, backbone.card.spec, decoded.where)
                features[kind] = found
    return BatchFeatures(
        decoded.kept, decoded.digests, decoded.sizes, features, decoded.skipped, seconds, decoded.marked
    )


def require_finite(features: npt.NDArray[np.float32], backbone: str, where: Sequence[str]) -> None:
    """Refuse features, shape (n, D), that are not finite; name the first image that has such."""
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(
            f"{backbone} gives features that are not finite for {where[int(bad[0])]}: check the "
            f"weights of the backbone, or remove the image"
        )


def iterate_batches(
    source: Source,
    task: PartitionTask,
    equipment: ExtractionRuntime,
    size: int,
    limit: int | None,
    labels: list[tuple[str, str]],
) -> Iterator[list[tuple[int, Sample | SampleFile]]]:
    """Yield the samples of a task in batches, each with its place; batches never span tasks.

    Parameters
    ----------
    equipment : Equipment
        Says whether files are read here.
    limit : int or None
        Where labels are not known, samples of a class to yield at most: no more of them can be in use.
    labels : list of (str, str)
        Gets the label of every sample that is listed, and how it is written.

    Raises
    ------
    InputError
        If there are fewer samples than were listed.
    """
    batch: list[tuple[int, Sample | SampleFile]] = []
    seen: Counter[str] = Counter()
    for place, sample in enumerate(equipment.reading(task.listed(source))):
        labels.append((sample.label, sample.label_text if isinstance(sample, Sample) else ""))
        seen[sample.label] += 1
        if task.rows is not None or limit is None or seen[sample.label] <= limit:
            batch.append((place, sample))
        # Which images are seen together depends on the images alone: they may round each other otherwise.
        if len(batch) == size or count_encoded_bytes(batch) > MAX_BATCH_BYTES:
            yield batch
            batch = []
    if task.rows is not None and len(labels) != len(task.rows):
        raise InputError(
            f"{source.spec} shrank while it was read: {len(labels)} of {len(task.rows)} samples of "
            f"partition {task.name} are there; run again"
        )
    if batch:
        yield batch


def count_encoded_bytes(batch: SampleBatch) -> int:
    """Return the size of the encoded images that a batch holds; files that are not read yet hold none."""
    return sum(len(sample.data) for _, sample in batch if isinstance(sample, Sample))


def find_missing_backbones(
    task: PartitionTask, backbones: Collection[Backbone], staging: Staging, rules: PassOptions
) -> list[Backbone] | None:
    """Return the backbones whose features of a task are not staged; None if the task is complete."""
    found = staging.found(task)
    if found is None:
        return list(backbones)
    rows = len(found.kept)
    absent = [
        backbone
        for backbone in backbones
        if not all(
            staging.has(kind, task, np.float32, rows, (backbone.card.features,))
            for kind in rules.kinds(backbone.card.hash, task.split)
        )
    ]
    known = staging.has("sizes", task, np.int64, rows, ()) and staging.has(
        "digests", task, np.uint8, rows, (32,)
    )
    return None if known and not absent else absent


def stage_tasks(
    source: Source,
    tasks: Sequence[PartitionTask],
    backbones: Sequence[Backbone],
    staging: Staging,
    rules: PassOptions,
    equipment: ExtractionRuntime,
) -> Generator[PassProgress, None, None]:
    """Read tasks and stage what is missing of each, in this process.

    A task is complete when it says so, last of all; one that was cut short is read again.

    Parameters
    ----------
    backbones : sequence of Backbone
        As :func:`~sfm.pipeline.runtime.optimize_for_inference` gives them.
    equipment : Equipment

    Raises
    ------
    InputError
        If images cannot be read or decoded, or give features that are not finite.
    Unfinished
        If a process that decodes is lost.
    """
    device = backbones[0].device.type
    waiting: deque[Future[BatchFeatures] | Callable[[], None]] = deque()
    held: deque[int] = deque()  # Bytes of the batches among those.
    parts: list[BatchFeatures] = []
    workers = ThreadPoolExecutor(equipment.threads, thread_name_prefix="look")
    with one_torch_thread(), tf32_disabled(), workers as pool:

        def ahead() -> Iterator[None]:
            for task in tasks:
                absent, labels = (
                    find_missing_backbones(task, backbones, staging, rules),
                    list[tuple[str, str]](),
                )
                if absent is None:
                    continue
                for batch in iterate_batches(
                    source, task, equipment, BATCH_IMAGES[device], rules.limit_per_class, labels
                ):
                    waiting.append(
                        pool.submit(compute_batch_features, batch, task.split, equipment, absent, rules)
                    )
                    held.append(count_encoded_bytes(batch))
                    yield
                unused = {} if task.rows is not None else dict(task.shard(source).unused)
                waiting.append(
                    partial(save_task, staging, task, source, absent, rules, labels, parts, unused)
                )
                yield

        def next_done() -> PassProgress:
            first = waiting.popleft()
            if isinstance(first, Future):
                held.popleft()
                parts.append(seen := first.result())
                return PassProgress(len(seen.kept) + len(seen.skipped), len(seen.skipped), 0, seen.seconds)
            first()
            parts.clear()
            return PassProgress(partitions=1)

        try:
            for _ in ahead():
                while len(waiting) > 2 * equipment.threads + MAX_PENDING_BATCHES or (
                    held and sum(held) > MAX_QUEUED_BYTES
                ):
                    yield next_done()
            while waiting:
                yield next_done()
        finally:
            for left in waiting:
                if isinstance(left, Future):
                    left.cancel()


def save_task(
    staging: Staging,
    task: PartitionTask,
    source: Source,
    backbones: Sequence[Backbone],
    rules: PassOptions,
    labels: Sequence[tuple[str, str]],
    parts: Sequence[BatchFeatures],
    unused: dict[str, int],
) -> None:
    """Stage what was found in a task.

    Parameters
    ----------
    unused : dict of str to int
        What reading it passed over, by kind.

    Raises
    ------
    InputError
        If its samples are not those that another backbone saw before, or a class is written in two ways.
    """
    require_consistent_labels(source.spec, labels)
    digests = np.concatenate([np.zeros((0, 32), dtype=np.uint8), *(seen.digests for seen in parts)])
    if staging.saw_others(task, digests):
        staging.forget(task)
        raise InputError(
            f"images of {source.spec} changed between two runs of this extraction, in partition "
            f"{task.name}: run again"
        )
    for card in (backbone.card for backbone in backbones):
        none = np.zeros((0, card.features), dtype=np.float32)
        for kind in rules.kinds(card.hash, task.split):
            staging.put(kind, task, np.concatenate([none, *(seen.features[kind] for seen in parts)]))
    staging.put("sizes", task, np.array([size for seen in parts for size in seen.sizes], dtype=np.int64))
    staging.put("digests", task, digests)
    known = task.rows is not None
    marked = merge_marks(seen.marked for seen in parts)
    written: dict[str, set[str]] = {label: set() for label, _ in labels}
    for label, text in set(labels):
        written[label].add(text)
    classes = {label: index for index, label in enumerate(written)}
    found = TaskResult(
        read=len(labels),
        kept=[place for seen in parts for place in seen.kept],
        skipped=[skipped for seen in parts for skipped in seen.skipped],
        classes=[] if known else list(classes),
        labels=[] if known else [classes[label] for label, _ in labels],
        written=[] if known else [sorted(texts) for texts in written.values()],
        marked={mark: sorted(samples) for mark, samples in marked.items()},
        # A file's name need not be text, and what is stored must be.
        examples={mark: escape_non_utf8(samples[min(samples)]) for mark, samples in marked.items()},
        unused=unused,
    )
    staging.put_found(task, found)


def track_pass(
    steps: Iterator[PassProgress],
    tasks: Sequence[PartitionTask],
    work: Sequence[PartitionTask],
    staging: Staging,
    progress: ProgressCallback,
) -> PassSummary:
    """Consume the steps of a pass as they are made, and tell about them.

    Where the number of images is not known, progress is in partitions.

    Parameters
    ----------
    tasks, work : sequence of Task
        All of them, and those that were not complete before.
    """
    began = time.perf_counter()
    left = {task.name for task in work}
    resumed = [found for task in tasks if task.name not in left and (found := staging.found(task))]
    before = sum(len(found.kept) + len(found.skipped) for found in resumed)
    sizes = [len(task.rows) for task in tasks if task.rows is not None]
    by_images = len(sizes) == len(tasks)
    total, unit = (sum(sizes), "images") if by_images else (len(tasks), "partitions")
    read = skipped = partitions = 0
    spent: Counter[str] = Counter()

    def tell() -> None:
        seconds = time.perf_counter() - began
        done = before + read if by_images else len(resumed) + partitions
        figures = {"images/s": read / seconds if read else 0.0}
        figures["partitions left"] = len(tasks) - len(resumed) - partitions
        if skipped:
            figures["skipped"] = skipped
        figures |= {f"{what} ms": 1e3 * s / read for what, s in spent.items() if read}
        progress(Progress("features", min(done, total), total, unit, figures))

    tell()
    for step in steps:
        read, skipped, partitions = read + step.images, skipped + step.skipped, partitions + step.partitions
        spent.update(step.seconds)
        tell()
    return PassSummary(read, before, time.perf_counter() - began)
