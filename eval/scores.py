"""From classifiers to the rows of an evaluation: everything that looks at held-out features."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfm.errors import InputError
from sfm.eval.accuracy import Heads, accuracy, confusion, nearest_mean_head
from sfm.eval.config import Mode, Protocol
from sfm.eval.images import ImageSet
from sfm.eval.methods import Trained, full_data_head
from sfm.eval.part import Part
from sfm.eval.result import (
    CLASSES_IN_FULL,
    MOST_CONFUSED,
    ConfusedPair,
    Fixed,
    FullData,
    Row,
    mean_and_deviation,
)
from sfm.eval.subjects import Subject
from sfm.stats_store.discriminant import fit_linear_discriminant


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples of an entry, as its backbone sees them.

    Attributes
    ----------
    features : Tensor, shape (sample, feature), float32
    labels : Tensor of int64, shape (sample,)
    """

    features: Tensor
    labels: Tensor


def held_out(subject: Subject) -> HeldOut:
    """Read the held-out samples to the backbone's device.

    Raises
    ------
    InputError
        If the classes have none.
    """
    features, labels = subject.part.held_out()
    if len(labels) == 0:
        raise InputError(
            f"no held-out sample of the classes distilled in the store, through {subject.backbone.card.spec}"
        )
    device = subject.backbone.device
    return HeldOut(torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device))


def full_data_of(subject: Subject, samples: HeldOut) -> list[FullData]:
    """Score what the store knows of all training images; the linear classifier comes first."""
    device = samples.features.device
    heads: dict[Fixed, Heads] = {
        "linear": full_data_head(subject.part, device),
        "nearest class mean": nearest_mean_head(
            torch.from_numpy(subject.part.read("train/mean").astype(np.float32)).to(device)
        ),
        "discriminant": discriminant_head(subject.part, device),
    }
    scores = {
        classifier: accuracy(head, samples.features, samples.labels) for classifier, head in heads.items()
    }
    return [
        FullData(
            backbone=subject.backbone.card.spec,
            image_size=subject.backbone.card.preprocessing.input_size,
            classifier=classifier,
            top1=score.top1[0],
            top5=None if score.top5 is None else score.top5[0],
            recovered=share_of(score.top1[0], scores["linear"].top1[0]),
            per_class=score.per_class,
        )
        for classifier, score in scores.items()
    ]


def discriminant_head(part: Part, device: torch.device) -> Heads:
    """Compute the linear discriminant of an entry's moments."""
    found = fit_linear_discriminant(part.moments())
    weight, bias = torch.from_numpy(found.weight), torch.from_numpy(found.bias)
    return Heads(weight[None].to(device), bias[None].to(device))


def row_of(
    subject: Subject,
    images: ImageSet,
    mode: Mode,
    trained: Trained,
    samples: HeldOut,
    full_top1: float,
    protocol: Protocol,
) -> Row:
    """Score what a mode trained on images, and sum up the figures of all seeds.

    Parameters
    ----------
    full_top1 : float
        Top-1 accuracy of the full-data classifier of the same backbone.
    protocol : Protocol
        How it was trained.
    """
    score = accuracy(trained.heads, samples.features, samples.labels)
    top1_mean, top1_std = mean_and_deviation(score.top1)
    top5_mean, top5_std = (None, None) if score.top5 is None else mean_and_deviation(score.top5)
    row = Row(
        images="none" if mode == "inherit-statistics" else images.name,
        backbone=subject.backbone.card.spec,
        image_size=subject.backbone.card.preprocessing.input_size,
        mode=mode,
        top1_mean=top1_mean,
        top1_std=top1_std,
        top5_mean=top5_mean,
        top5_std=top5_std,
        seeds=len(score.top1),
        top1=score.top1,
        top5=score.top5,
        recovered=share_of(top1_mean, full_top1),
        exemplars=images.exemplars,
        chosen=images.chosen,
        penalty=trained.penalty,
        backbone_hash=subject.backbone.card.hash,
        epochs=protocol.epochs,
        views=protocol.views,
        seed=protocol.seed,
    )
    if images.exemplars is not None:
        return row
    counts = confusion(trained.heads, samples.features, samples.labels)
    whole = counts.tolist() if len(counts) <= CLASSES_IN_FULL else None
    return row.model_copy(
        update={"confusion": whole, "confused": most_confused(counts), "per_class": score.per_class}
    )


def share_of(accuracy: float, full: float) -> float | None:
    """Return an accuracy as a fraction of another; None of nothing."""
    return accuracy / full if full else None


def most_confused(counts: Tensor) -> list[ConfusedPair]:
    """Return the most frequent confusions, most frequent first.

    Parameters
    ----------
    counts : Tensor of int64, shape (class, class)
        As :func:`~sfm.eval.accuracy.confusion` gives it.
    """
    wrong = counts.cpu() * ~torch.eye(len(counts), dtype=torch.bool)
    order = wrong.flatten().sort(descending=True, stable=True).indices[:MOST_CONFUSED]
    places = [divmod(place, len(counts)) for place in order.tolist()]
    return [
        ConfusedPair(right=right, predicted=predicted, count=int(wrong[right, predicted]))
        for right, predicted in places
        if wrong[right, predicted] > 0
    ]
