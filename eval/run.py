"""``sfm evaluate``: distilled images + statistics -> accuracies."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.errors import InputError
from sfm.eval.accuracy import Accuracy, Heads, accuracy, nearest_mean_head
from sfm.eval.baselines import NEAREST, RANDOM, fewest, nearest_exemplars, random_exemplars
from sfm.eval.config import EvaluateConfig, Mode
from sfm.eval.inherit import inherited_heads, train_projectors
from sfm.eval.pool import LabelledImages, draw_views, features_of_views
from sfm.eval.probe import DEVIATION, train_heads
from sfm.eval.result import EntryRecord, Evaluation, FullData, Provenance, Row, mean_and_deviation
from sfm.eval.subjects import Subject, find_subjects, find_teacher, source_entry
from sfm.eval.synthetic import DistilledRun, read_run
from sfm.eval.training import Purpose, Told, lay_out, normal
from sfm.events import Listener, Progress, nobody
from sfm.stats_store.digest import array_digest
from sfm.stats_store.history import known_summaries
from sfm.stats_store.store import Entry, Store, open_store

__all__ = ["Evaluation", "evaluate"]

PACKAGES = ("sfm-distill", "torch", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class ImageSet:
    """Images to train on.

    Attributes
    ----------
    name : {"distilled", "random", "nearest"}
    images : LabelledImages
        Those of the first seed, then those of the second, ..., or the same for all seeds.
    sharing : int
        How many seeds train on each image: all, or one.
    """

    name: Literal["distilled", "random", "nearest"]
    images: LabelledImages
    sharing: int


def evaluate(config: EvaluateConfig, progress: Listener = nobody) -> Evaluation:
    """Train on distilled images, test on the held-out features in the store, write ``evaluation.json``.

    The features of a pool of augmented views are computed once per image set and backbone; all epochs and
    modes draw on them. Linear heads of different seeds share no view; projectors of all seeds share theirs.
    The last epoch counts. No test image is decoded.

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
    started = time.perf_counter()
    run = read_run(config.run)
    store = open_store(config.store)
    known = known_summaries(store, f"{run.record.dataset}@{run.record.entry_digest}")
    source = source_entry(store, known, run, config.run)
    subjects = find_subjects(config, run.record, store, store.summaries(), source)
    teachers = [find_teacher(config, run.record, store, source, subjects)] if "inherit" in config.mode else []
    distilled = ImageSet("distilled", LabelledImages(run.pixels, run.labels), config.seeds)
    real, notes = real_images(source, run.record.ipc, config)

    pools = {
        backbone.card.hash: pool_of(backbone, distilled, config.mode, config, progress)
        for backbone in {s.backbone.card.hash: s.backbone for s in (*subjects, *teachers)}.values()
    }
    rows: list[Row] = []
    full_data: list[FullData] = []
    for subject in subjects:
        backbone, pool = subject.backbone, pools[subject.backbone.card.hash]
        features, labels = held_out(subject)
        if "linear" in config.mode:
            heads = linear(backbone, distilled, pool, config, progress)
            rows.append(row_of(backbone, "distilled", "linear", accuracy(heads, features, labels)))
        for teacher in teachers:
            targets = pools[teacher.backbone.card.hash]
            heads = inherit(backbone, teacher, pool, targets, config, progress)
            rows.append(row_of(backbone, "distilled", "inherit", accuracy(heads, features, labels)))
        for images in real:
            pool = pool_of(backbone, images, ["linear"], config, progress)
            heads = linear(backbone, images, pool, config, progress)
            rows.append(row_of(backbone, images.name, "linear", accuracy(heads, features, labels)))
        full_data += full_data_of(subject, features, labels)
    evaluation = Evaluation(
        config=config.model_dump(mode="json") | {"store": store.url},
        rows=rows,
        full_data=full_data,
        notes=notes,
        provenance=provenance_of(store, run, source, subjects, time.perf_counter() - started),
    )
    write_whole(config.run / "evaluation.json", evaluation.model_dump_json(indent=1).encode())
    return evaluation


def real_images(source: Entry, ipc: int, config: EvaluateConfig) -> tuple[list[ImageSet], list[str]]:
    """Choose as many real images per class as were distilled, from the exemplars of the run's entry.

    Returns
    -------
    list of ImageSet
        ``random`` and ``nearest``, as far as there are enough exemplars.
    list of str
        What is missing, and why.
    """
    if "exemplar/role" not in source:
        return [], ["No real images to compare with: the store keeps no exemplars (sfm extract --exemplars)."]
    role, images = source.read("exemplar/role"), source.read("exemplar/image")
    classes = np.arange(len(role))
    sets, notes = [], []
    held = fewest(role, RANDOM)
    if held >= ipc:
        drawn = random_exemplars(role, ipc, config.seeds, config.seed)
        pixels = images[classes[:, None], drawn].reshape(-1, *images.shape[2:])
        labels = np.tile(np.repeat(classes, ipc), config.seeds)
        sets.append(ImageSet("random", LabelledImages(pixels, labels), 1))
        if held < ipc * config.seeds:
            notes.append(
                f"The {config.seeds} random draws share images: the store keeps {held} random exemplars of "
                f"some class."
            )
    else:
        notes.append(f"No random real images: some class has {held} such exemplars, {ipc} are needed.")
    held = fewest(role, NEAREST)
    if held >= ipc:
        pixels = images[classes[:, None], nearest_exemplars(role, ipc)].reshape(-1, *images.shape[2:])
        sets.append(ImageSet("nearest", LabelledImages(pixels, np.repeat(classes, ipc)), config.seeds))
    else:
        notes.append(f"No real images nearest to the mean: some class has {held}, {ipc} are needed.")
    return sets, notes


def pool_of(
    backbone: Backbone, images: ImageSet, modes: Sequence[Mode], config: EvaluateConfig, progress: Listener
) -> Tensor:
    """Compute the features of as many views as the modes look at: shape (image, view, feature)."""
    wanted = {"linear": images.sharing * config.views, "inherit": config.projector_views}
    crops = draw_views(images.images, max(wanted[mode] for mode in modes), config.seed)
    told = telling(progress, f"features of {images.name} images on {backbone.card.spec}", "views")
    return features_of_views(backbone, images.images, crops, told)


def linear(
    backbone: Backbone, images: ImageSet, pool: Tensor, config: EvaluateConfig, progress: Listener
) -> Heads:
    """Train fresh heads on the views of images; seeds that share an image share none of its views."""
    own = pool[:, : images.sharing * config.views].reshape(-1, config.views, pool.shape[2])
    # Rows of `own` count images first, then the seeds that share one.
    rows = np.arange(len(own)).reshape(config.seeds // images.sharing, -1, images.sharing)
    labels = torch.from_numpy(images.images.labels).to(pool.device).repeat_interleave(images.sharing)
    start = normal(config.seed, Purpose.HEAD, (config.seeds, int(labels.max()) + 1, pool.shape[2]), DEVIATION)
    plan = lay_out(
        config.seed,
        rows.transpose(0, 2, 1).reshape(config.seeds, -1),
        epochs=config.epochs,
        views=config.views,
    )
    told = telling(progress, f"linear heads of {images.name} images on {backbone.card.spec}", "epochs")
    return train_heads(own, labels, plan, start, told)


def inherit(
    backbone: Backbone,
    teacher: Subject,
    pool: Tensor,
    targets: Tensor,
    config: EvaluateConfig,
    progress: Listener,
) -> Heads:
    """Train projectors to the distillation backbone on distilled images, and put its classifier behind."""
    plan = lay_out(
        config.seed,
        np.tile(np.arange(len(pool)), (config.seeds, 1)),
        epochs=config.epochs,
        views=config.projector_views,
    )
    names = f"{backbone.card.spec} to {teacher.backbone.card.spec}"
    told = telling(progress, f"projectors from {names}", "blocks")
    return inherited_heads(train_projectors(pool, targets, plan, told), full_data_head(teacher))


def telling(progress: Listener, stage: str, unit: str) -> Told:
    """Turn "so much of so much is done" into progress of a stage."""
    return lambda done, total: progress(Progress(stage, done, total, unit))


def held_out(subject: Subject) -> tuple[Tensor, Tensor]:
    """Read the held-out features (float32) and labels (int64) to the backbone's device."""
    device = subject.backbone.device
    features = torch.from_numpy(subject.entry.read("test/feature").astype(np.float32)).to(device)
    return features, torch.from_numpy(subject.entry.read("test/label").astype(np.int64)).to(device)


def full_data_head(subject: Subject) -> Heads:
    """Read the linear classifier of all real training data."""
    weight = torch.from_numpy(subject.entry.read("classifier/weight"))
    bias = torch.from_numpy(subject.entry.read("classifier/bias"))
    return Heads(weight[None].to(subject.backbone.device), bias[None].to(subject.backbone.device))


def full_data_of(subject: Subject, features: Tensor, labels: Tensor) -> list[FullData]:
    """Score what the store knows of all training images."""
    means = torch.from_numpy(subject.entry.read("train/mean").astype(np.float32))
    heads: dict[Literal["linear", "nearest class mean"], Heads] = {
        "linear": full_data_head(subject),
        "nearest class mean": nearest_mean_head(means.to(features.device)),
    }
    found = []
    for classifier, head in heads.items():
        score = accuracy(head, features, labels)
        found.append(
            FullData(
                backbone=subject.backbone.card.spec,
                image_size=subject.backbone.card.preprocessing.input_size,
                classifier=classifier,
                top1=score.top1[0],
                top5=None if score.top5 is None else score.top5[0],
            )
        )
    return found


def row_of(
    backbone: Backbone, images: Literal["distilled", "random", "nearest"], mode: Mode, score: Accuracy
) -> Row:
    """Sum up the figures of all seeds."""
    top1_mean, top1_std = mean_and_deviation(score.top1)
    top5_mean, top5_std = (None, None) if score.top5 is None else mean_and_deviation(score.top5)
    return Row(
        images=images,
        backbone=backbone.card.spec,
        image_size=backbone.card.preprocessing.input_size,
        mode=mode,
        top1_mean=top1_mean,
        top1_std=top1_std,
        top5_mean=top5_mean,
        top5_std=top5_std,
        seeds=len(score.top1),
        top1=score.top1,
        top5=score.top5,
    )


def provenance_of(
    store: Store, run: DistilledRun, source: Entry, subjects: Sequence[Subject], seconds: float
) -> Provenance:
    """Say where the figures come from."""
    device = subjects[0].backbone.device
    return Provenance(
        store=store.url,
        dataset=source.dataset.name,
        fingerprint=source.summary.fingerprint,
        role=source.summary.role,
        distilled_from=source.summary.entry_digest,
        distilled_on=source.backbone.spec,
        ipc=run.record.ipc,
        images=array_digest(run.pixels),
        entries=[
            EntryRecord(
                backbone=s.backbone.card.spec,
                backbone_hash=s.backbone.card.hash,
                image_size=s.backbone.card.preprocessing.input_size,
                entry_digest=s.entry.summary.entry_digest,
                held_out_samples=s.entry.dataset.test_samples,
            )
            for s in subjects
        ],
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=seconds,
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or, after an error, as it was.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
