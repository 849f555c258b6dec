"""``sfm evaluate``: distilled images + statistics -> accuracies."""

import functools
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.cpu_threads import limit_threads
from sfm.backbones.execution.preparation import prepare_for_inference
from sfm.errors import InputError
from sfm.eval.accumulate import accumulate, read_result
from sfm.eval.classifiers import save_classifier
from sfm.eval.config import (
    EvaluateConfig,
    EvaluateRunsConfig,
    Mode,
    classifier_folder,
    protocol_of,
    views_of,
)
from sfm.eval.findings import findings
from sfm.eval.images import ImageSet, exemplars_of, neighbours_of, real_images
from sfm.eval.interrupted import work_folder
from sfm.eval.methods import SEEN_BY_BOTH, Ground, telling, train
from sfm.eval.output_files import require_writable_output, write_output
from sfm.eval.part import Part
from sfm.eval.pool import LabelledImages, draw_views, features_of_views
from sfm.eval.portable import portable_config
from sfm.eval.result import EntryRecord, Evaluation, FullData, NotWrittenError, Provenance, Row, as_json
from sfm.eval.scores import HeldOut, full_data_of, held_out, row_of
from sfm.eval.subjects import Load, Subject, find_subjects, find_teacher, source_part
from sfm.eval.synthetic import DistilledRun, read_run
from sfm.eval.work import Work, work_key
from sfm.events import ProgressCallback, no_progress
from sfm.locking import lock_file, lock_folder
from sfm.stats_store.cards import Summary
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.history import summaries_for
from sfm.stats_store.store import Store, open_store
from sfm.text import escape_non_utf8

__all__ = ["Evaluation", "NotWrittenError", "evaluate", "evaluate_runs"]

PROTOCOL = ("seeds", "epochs", "views", "projector_views", "seed")
"""Options that figures depend on, whatever is evaluated."""

PACKAGES = ("sfm-distill", "torch", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Ready:
    """A run with all that its evaluation needs, found and checked.

    Attributes
    ----------
    config : EvaluateConfig
    run : DistilledRun
    store : Store
    source : Part
        The statistics distilled from.
    subjects : list of Subject
        The backbones to evaluate on.
    teacher : Subject or None
        The backbone distilled on, where a mode needs its features.
    notes : list of str
        What is to be known already.
    """

    config: EvaluateConfig
    run: DistilledRun
    store: Store
    source: Part
    subjects: list[Subject]
    teacher: Subject | None
    notes: list[str]

    @property
    def edited(self) -> bool | None:
        """Whether the images are others than `sfm distill` wrote; None if that is not known."""
        written = self.run.record.images
        return None if written is None else written != compute_array_digest(self.run.pixels)


def evaluate(config: EvaluateConfig, progress: ProgressCallback = no_progress) -> Evaluation:
    """Train on distilled images, test on the held-out features in the store, write ``evaluation.json``.

    What was evaluated before stays in the file, unless it is measured again. Features of views and finished
    rows are kept beside it until all is done: an interrupted evaluation goes on where it was, and ends with
    the same numbers.

    The features of a pool of augmented views are computed once per image set and backbone; all epochs and
    modes draw on them. Heads of different seeds share no view; projectors of all seeds share theirs. The last
    epoch counts. No test image is decoded.

    Parameters
    ----------
    config : EvaluateConfig
    progress : Listener
        Told of views computed, and of epochs and blocks trained.

    Returns
    -------
    Evaluation
        What this evaluation found.

    Raises
    ------
    InputError
        If the directory is not a whole run, the store is another one or lacks what is needed, a backbone is
        not the one of its entry, or the result cannot be written, which is tried before anything is trained.
    NotWrittenError
        If it cannot be written in the end; holds it.
    """
    (evaluation,) = evaluate_runs(EvaluateRunsConfig.model_validate(config.model_dump()), progress)
    return evaluation


def evaluate_runs(config: EvaluateRunsConfig, progress: ProgressCallback = no_progress) -> list[Evaluation]:
    """Evaluate several runs of the same data on the same backbones, see :func:`evaluate`.

    All runs are checked before the first is trained on; a backbone is loaded once.

    Returns
    -------
    list of Evaluation
        What this command found, one per run; :func:`~sfm.eval.matrix.matrix` arranges them. The files hold
        what earlier commands found as well, see :func:`~sfm.eval.accumulate.accumulate`.

    Raises
    ------
    InputError
        As :func:`evaluate`; or if the runs are of different data, or another process is writing one.
    NotWrittenError
        If all was evaluated and a result cannot be written; holds the results.
    """
    several = config.each()
    with ExitStack() as locks:
        locks.enter_context(limit_threads(config.threads))
        for each in several:
            if each.out:
                locks.enter_context(lock_file(each.result))
            elif each.run.is_dir():
                locks.enter_context(lock_folder(each.run))
        return evaluate_locked(config, several, progress)


def evaluate_locked(
    config: EvaluateRunsConfig, several: Sequence[EvaluateConfig], progress: ProgressCallback
) -> list[Evaluation]:
    """Do what :func:`evaluate_runs` says, in directories that no other process writes meanwhile."""
    runs = [read_run(each.run) for each in several]
    store = open_store(config.store)
    summaries = store.list_summaries()

    @functools.cache
    def load(spec: str, image_size: int | None) -> Backbone:
        loaded = load_backbone(spec, image_size=image_size, device=config.device, progress=progress)
        return prepare_for_inference(loaded)

    ready = [ready_for(each, run, store, summaries, load) for each, run in zip(several, runs, strict=True)]
    require_same_data(ready)
    works = [Work(work_folder(each.result)) for each in several]
    for each, run in zip(several, runs, strict=True):
        require_writable_output(each.result)
        require_own(each, run)
    done = [
        finish(each, work, progress if len(ready) == 1 else named(progress, each.config.run.name))
        for each, work in zip(ready, works, strict=True)
    ]
    unwritten = [line for _, lines in done for line in lines]
    if unwritten:
        raise NotWrittenError("; ".join(dict.fromkeys(unwritten)), [evaluation for evaluation, _ in done])
    for work in works:
        work.remove()
    return [evaluation for evaluation, _ in done]


def require_own(config: EvaluateConfig, run: DistilledRun) -> None:
    """Refuse to write over what is no result, or, where `--out` names a place, over that of other images.

    In the run itself, results of images that were replaced since are dropped, see
    :func:`~sfm.eval.accumulate.accumulate`.

    Raises
    ------
    InputError
        If it is one of those.
    """
    before = read_result(config.result)
    if config.out and before and before.provenance.images != compute_array_digest(run.pixels):
        raise InputError(
            f"--out {config.out}: {config.result} holds the result of other images than those in "
            f"{config.run}: give another place"
        )


def ready_for(
    config: EvaluateConfig, run: DistilledRun, store: Store, summaries: Sequence[Summary], load: Load
) -> Ready:
    """Find and check all that the evaluation of a run needs; errors as of :func:`evaluate`."""
    known = summaries_for(store, f"{run.record.dataset}@{run.record.entry_digest}")
    source = source_part(store, known, run, config.run)
    subjects, notes = find_subjects(config, run.record, store, summaries, source, load)
    teacher = (
        find_teacher(run.record, store, source, subjects, load)
        if SEEN_BY_BOTH.intersection(config.mode)
        else None
    )
    if not source.whole:
        notes.append(
            f"{len(run.class_ids)} of the {len(source.entry.dataset.class_ids)} classes were distilled: "
            f"held-out samples, classifiers and means of the others are left out."
        )
    return Ready(config, run, store, source, subjects, teacher, notes)


def require_same_data(ready: Sequence[Ready]) -> None:
    """Refuse runs that no matrix can hold."""
    first, *others = ready
    for other in others:
        if data_of(other) != data_of(first):
            raise InputError(
                f"{first.config.run} and {other.config.run} are of different data or classes "
                f"({first.run.record.dataset}, {other.run.record.dataset}): evaluate them one by one"
            )


def data_of(ready: Ready) -> tuple[str, str, list[str]]:
    """Return what tells which held-out samples a run is evaluated on."""
    summary = ready.source.entry.summary
    return summary.fingerprint, summary.role, ready.run.class_ids


def named(progress: ProgressCallback, run: str) -> ProgressCallback:
    """Tell of the stages of one of several runs."""
    return lambda event: progress(replace(event, stage=f"{run}: {event.stage}"))


def finish(ready: Ready, work: Work, progress: ProgressCallback) -> tuple[Evaluation, list[str]]:
    """Train, score and write what one run's evaluation consists of.

    Returns
    -------
    Evaluation
        What was found, whether it could be written or not.
    list of str
        What could not be written, and why.
    """
    started = time.perf_counter()
    config, run = ready.config, ready.run
    distilled = ImageSet("distilled", LabelledImages(run.pixels, run.labels), config.seeds)
    exemplars = exemplars_of(ready.source)
    real, missing = real_images(exemplars, run.record.ipc, config)
    edited = ["The images are not as sfm distill wrote them: they were edited since."] if ready.edited else []

    @functools.cache
    def views(backbone_hash: str) -> Pool:
        seen = [*ready.subjects, *([ready.teacher] if ready.teacher else [])]
        backbone = next(s.backbone for s in seen if s.backbone.card.hash == backbone_hash)
        return pool_of(backbone, distilled, config.mode, config, work, progress)

    rows: list[Row] = []
    full_data: list[FullData] = []
    unwritten: list[str] = []
    for subject in ready.subjects:
        samples = held_out(subject)
        full = full_data_of(subject, samples)
        full_data += full
        scoring = Scoring(ready, subject, samples, full[0].top1, work, progress)
        for mode in dict.fromkeys(config.mode):
            rows.append(scoring.row(distilled, mode, views, unwritten))
        for images in (*real, *neighbours_of(run, exemplars, subject.backbone, config, work)):
            rows.append(scoring.row(images, "linear", None, unwritten))
    provenance = provenance_of(ready, time.perf_counter() - started)
    found = Evaluation(
        config=portable_config(config, ready.store.url),
        rows=rows,
        full_data=full_data,
        notes=[*edited, *ready.notes, *missing, *findings(rows, full_data, provenance.entries)],
        provenance=provenance,
    )
    try:
        together = accumulate(found, read_result(config.result), len(run.pixels))
        write_output(config.result, as_json(together).encode())
        found = found.model_copy(update={"changes": together.changes})
    except InputError as error:
        unwritten.append(str(error))
    return found, unwritten


@dataclass(frozen=True)
class Pool:
    """Features of views.

    Attributes
    ----------
    features : Tensor, shape (image, view, feature)
    key : str
        Under which they are kept.
    """

    features: Tensor
    key: str


@dataclass(frozen=True)
class Scoring:
    """How the rows of one backbone come about.

    Attributes
    ----------
    ready : Ready
    subject : Subject
    samples : HeldOut
    full_top1 : float
        Of the classifier of all real images.
    work : Work
        Where rows are kept, and taken from.
    progress : Listener
    """

    ready: Ready
    subject: Subject
    samples: HeldOut
    full_top1: float
    work: Work
    progress: ProgressCallback

    def row(
        self, images: ImageSet, mode: Mode, views: Callable[[str], Pool] | None, unwritten: list[str]
    ) -> Row:
        """Return what a mode scores on images; trained now, unless that was done before an interruption.

        Parameters
        ----------
        images : ImageSet
        mode : Mode
        views : callable, optional
            Gives the features of the images' views through the backbone of a hash; by default they are
            computed for this row alone.
        unwritten : list of str
            Gets what could not be written.
        """
        config, source, subject = self.ready.config, self.ready.source, self.subject
        key = row_key(self.ready, subject, images, mode)
        done = self.work.read_row(key)
        if done is not None:
            return done
        targets: Pool | None = None
        if views is None:
            pool = pool_of(subject.backbone, images, [mode], config, self.work, self.progress)
        else:
            pool = views(subject.backbone.card.hash)
            if self.ready.teacher and mode in SEEN_BY_BOTH:
                targets = views(self.ready.teacher.backbone.card.hash)
        ground = Ground(subject, source, images, pool.features, targets.features if targets else None)
        trained = train(mode, ground, config, self.progress)
        protocol = protocol_of(config, mode, len(images.images.pixels))
        row = row_of(subject, images, mode, trained, self.samples, self.full_top1, protocol)
        if config.save and images.name == "distilled":
            try:
                save_classifier(
                    classifier_folder(config.result), trained, row, self.ready.run, subject, source
                )
            except InputError as error:
                unwritten.append(str(error))
                return row
        self.work.keep_row(key, row, [used.key for used in (pool, targets) if used])
        return row


def row_key(ready: Ready, subject: Subject, images: ImageSet, mode: Mode) -> str:
    """Name everything that a row depends on, and the file that it leaves."""
    asked = ready.config.model_dump(mode="json", include={*PROTOCOL, "save"})
    return work_key(
        row=[images.name, mode, subject.backbone.card.hash, subject.backbone.card.spec],
        images=compute_array_digest(images.images.pixels),
        entries=[part.entry.summary.entry_digest for part in (subject.part, ready.source)],
        classes=ready.run.class_ids,
        asked=asked,
        saved_to=str(classifier_folder(ready.config.result).resolve()) if ready.config.save else None,
        version=version("sfm-distill"),
        device=subject.backbone.device,
    )


def pool_of(
    backbone: Backbone,
    images: ImageSet,
    modes: Sequence[Mode],
    config: EvaluateConfig,
    work: Work,
    progress: ProgressCallback,
) -> Pool:
    """Compute the features of as many views as the modes look at."""
    count = len(images.images.pixels)
    wanted = max(
        views_of(config, mode, count) * (images.sharing if mode in ("linear", "kd") else 1) for mode in modes
    )
    crops = draw_views(images.images, wanted, config.seed)
    told = telling(progress, f"features of {images.name} images on {backbone.card.spec}", "views")
    features = features_of_views(backbone, images.images, crops, told, work)
    return Pool(features, work.used[-1])


def provenance_of(ready: Ready, seconds: float) -> Provenance:
    """Say where the figures come from."""
    device = ready.subjects[0].backbone.device
    source = ready.source.entry
    return Provenance(
        store=escape_non_utf8(ready.store.url),
        dataset=source.dataset.name,
        fingerprint=source.summary.fingerprint,
        role=source.summary.role,
        distilled_from=source.summary.entry_digest,
        distilled_on=source.backbone.spec,
        ipc=ready.run.record.ipc,
        images=compute_array_digest(ready.run.pixels),
        edited=ready.edited,
        entries=[
            EntryRecord(
                backbone=s.backbone.card.spec,
                backbone_hash=s.backbone.card.hash,
                image_size=s.backbone.card.preprocessing.input_size,
                entry_digest=s.part.entry.summary.entry_digest,
                held_out_samples=len(s.part.held_out()[1]),
                train_per_class=s.part.entry.dataset.train_samples / len(s.part.entry.dataset.class_ids),
            )
            for s in ready.subjects
        ],
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=seconds,
        distilled_on_hash=source.backbone.hash,
        distilled_at=source.backbone.preprocessing.input_size,
        evaluated_on=[s.backbone.card.hash for s in ready.subjects],
    )
