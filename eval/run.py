"""``sfm evaluate``: distilled images + statistics -> accuracies."""

import functools
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.frozen import for_features
from sfm.errors import InputError
from sfm.eval.classifiers import FOLDER, as_file, file_name
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig, Mode, views_of
from sfm.eval.images import ImageSet, exemplars_of, neighbours_of, real_images
from sfm.eval.methods import SEEN_BY_BOTH, Ground, telling, train
from sfm.eval.part import Part
from sfm.eval.pool import LabelledImages, draw_views, features_of_views
from sfm.eval.result import EntryRecord, Evaluation, FullData, Provenance, Row, as_json
from sfm.eval.scores import full_data_of, held_out, row_of
from sfm.eval.subjects import Load, Subject, find_subjects, find_teacher, source_part
from sfm.eval.synthetic import DistilledRun, read_run
from sfm.eval.whole import write_whole
from sfm.events import Listener, nobody
from sfm.locking import lock_folder
from sfm.stats_store.cards import Summary
from sfm.stats_store.digest import array_digest
from sfm.stats_store.history import known_summaries
from sfm.stats_store.store import Store, open_store

__all__ = ["Evaluation", "evaluate", "evaluate_runs"]

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
        return None if written is None else written != array_digest(self.run.pixels)


def evaluate(config: EvaluateConfig, progress: Listener = nobody) -> Evaluation:
    """Train on distilled images, test on the held-out features in the store, write ``evaluation.json``.

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
        As written into the run's directory.

    Raises
    ------
    InputError
        If the directory is not a whole run, the store is another one or lacks what is needed, a backbone is
        not the one of its entry, or the result cannot be written.
    """
    (evaluation,) = evaluate_runs(EvaluateRunsConfig.model_validate(config.model_dump()), progress)
    return evaluation


def evaluate_runs(config: EvaluateRunsConfig, progress: Listener = nobody) -> list[Evaluation]:
    """Evaluate several runs of the same data on the same backbones, see :func:`evaluate`.

    All runs are checked before the first is trained on; a backbone is loaded once.

    Returns
    -------
    list of Evaluation
        One per run, each as written into its directory; :func:`~sfm.eval.matrix.matrix` arranges them.

    Raises
    ------
    InputError
        As :func:`evaluate`; or if the runs are of different data, or another process is writing one.
    """
    several = config.each()
    with ExitStack() as locks:
        for folder in dict.fromkeys(each.run.resolve() for each in several if each.run.is_dir()):
            locks.enter_context(lock_folder(folder))
        return evaluate_locked(config, several, progress)


def evaluate_locked(
    config: EvaluateRunsConfig, several: Sequence[EvaluateConfig], progress: Listener
) -> list[Evaluation]:
    """Do what :func:`evaluate_runs` says, in directories that no other process writes meanwhile."""
    runs = [read_run(each.run) for each in several]
    store = open_store(config.store)
    summaries = store.summaries()

    @functools.cache
    def load(spec: str, image_size: int | None) -> Backbone:
        loaded = load_backbone(spec, image_size=image_size, device=config.device, progress=progress)
        return for_features(loaded)

    ready = [ready_for(each, run, store, summaries, load) for each, run in zip(several, runs, strict=True)]
    require_same_data(ready)
    return [
        finish(each, progress if len(ready) == 1 else named(progress, each.config.run.name)) for each in ready
    ]


def ready_for(
    config: EvaluateConfig, run: DistilledRun, store: Store, summaries: Sequence[Summary], load: Load
) -> Ready:
    """Find and check all that the evaluation of a run needs; errors as of :func:`evaluate`."""
    known = known_summaries(store, f"{run.record.dataset}@{run.record.entry_digest}")
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


def named(progress: Listener, run: str) -> Listener:
    """Tell of the stages of one of several runs."""
    return lambda event: progress(replace(event, stage=f"{run}: {event.stage}"))


def finish(ready: Ready, progress: Listener) -> Evaluation:
    """Train, score and write what one run's evaluation consists of."""
    started = time.perf_counter()
    config, run, source = ready.config, ready.run, ready.source
    distilled = ImageSet("distilled", LabelledImages(run.pixels, run.labels), config.seeds)
    exemplars = exemplars_of(source)
    real, missing = real_images(exemplars, run.record.ipc, config)
    edited = ["The images are not as sfm distill wrote them: they were edited since."] if ready.edited else []

    seen = [*ready.subjects, *([ready.teacher] if ready.teacher else [])]
    pools = {
        backbone.card.hash: pool_of(backbone, distilled, config.mode, config, progress)
        for backbone in {s.backbone.card.hash: s.backbone for s in seen}.values()
    }
    targets = pools[ready.teacher.backbone.card.hash] if ready.teacher else None
    rows: list[Row] = []
    full_data: list[FullData] = []
    for subject in ready.subjects:
        samples = held_out(subject)
        full = full_data_of(subject, samples)
        full_data += full
        ground = Ground(subject, source, distilled, pools[subject.backbone.card.hash], targets)
        for mode in dict.fromkeys(config.mode):
            trained = train(mode, ground, config, progress)
            rows.append(row_of(subject, distilled, mode, trained, samples, full[0].top1))
            if config.save:
                card = subject.backbone.card
                data = as_file(trained, card, source.entry.backbone, mode, run.class_ids)
                write_whole(config.run / FOLDER / file_name(card.spec, mode), data)
        for images in (*real, *neighbours_of(run, exemplars, subject.backbone, config)):
            pool = pool_of(subject.backbone, images, ["linear"], config, progress)
            trained = train("linear", Ground(subject, source, images, pool, None), config, progress)
            rows.append(row_of(subject, images, "linear", trained, samples, full[0].top1))
    evaluation = Evaluation(
        config=config.model_dump(mode="json") | {"store": ready.store.url},
        rows=rows,
        full_data=full_data,
        notes=[*edited, *ready.notes, *missing],
        provenance=provenance_of(ready, time.perf_counter() - started),
    )
    write_whole(config.run / "evaluation.json", as_json(evaluation).encode())
    return evaluation


def pool_of(
    backbone: Backbone, images: ImageSet, modes: Sequence[Mode], config: EvaluateConfig, progress: Listener
) -> Tensor:
    """Compute the features of as many views as the modes look at: shape (image, view, feature)."""
    count = len(images.images.pixels)
    wanted = max(
        views_of(config, mode, count) * (images.sharing if mode in ("linear", "kd") else 1) for mode in modes
    )
    crops = draw_views(images.images, wanted, config.seed)
    told = telling(progress, f"features of {images.name} images on {backbone.card.spec}", "views")
    return features_of_views(backbone, images.images, crops, told)


def provenance_of(ready: Ready, seconds: float) -> Provenance:
    """Say where the figures come from."""
    device = ready.subjects[0].backbone.device
    source = ready.source.entry
    return Provenance(
        store=ready.store.url,
        dataset=source.dataset.name,
        fingerprint=source.summary.fingerprint,
        role=source.summary.role,
        distilled_from=source.summary.entry_digest,
        distilled_on=source.backbone.spec,
        ipc=ready.run.record.ipc,
        images=array_digest(ready.run.pixels),
        edited=ready.edited,
        entries=[
            EntryRecord(
                backbone=s.backbone.card.spec,
                backbone_hash=s.backbone.card.hash,
                image_size=s.backbone.card.preprocessing.input_size,
                entry_digest=s.part.entry.summary.entry_digest,
                held_out_samples=len(s.part.held_out()[1]),
            )
            for s in ready.subjects
        ],
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=seconds,
    )
