"""Score heads on held-out features: the accuracy rows of an evaluation. Nothing else reads those features."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfm.errors import InputError
from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.eval.config import Mode, RowTrainingOptions
from sfm.eval.evaluated_backbones import EvaluatedBackbone
from sfm.eval.head_accuracy import (
    LinearHeads,
    SingleLinearHead,
    compute_accuracy_by_seed,
    compute_summed_confusion_matrix,
    make_nearest_mean_head,
)
from sfm.eval.image_sets import ImageSet
from sfm.eval.mode_training import FittedHeads, read_full_data_classifier
from sfm.eval.result import (
    MAX_CONFUSED_PAIRS,
    MAX_CONFUSION_CLASSES,
    AccuracyRow,
    ConfusedPair,
    FullDataClassifier,
    FullDataRow,
    compute_mean_and_sample_std,
)
from sfm.stats_store.discriminant import fit_linear_discriminant


@dataclass(frozen=True)
class HeldOutSamples:
    """Features and labels of an entry's held-out samples.

    Attributes
    ----------
    features : Tensor, shape (sample, feature), float32
    labels : Tensor of int64, shape (sample,)
    """

    features: Tensor
    labels: Tensor


def load_held_out_samples(eval_backbone: EvaluatedBackbone) -> HeldOutSamples:
    """Load the held-out samples to the backbone's device.

    Raises
    ------
    InputError
        If the classes have none.
    """
    features, labels = eval_backbone.statistics.read_held_out_arrays()
    if len(labels) == 0:
        raise InputError(
            f"no held-out sample of the classes distilled in the store, through "
            f"{eval_backbone.backbone.card.spec}"
        )
    device = eval_backbone.backbone.device
    return HeldOutSamples(torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device))


def make_full_data_rows(
    eval_backbone: EvaluatedBackbone, held_out_samples: HeldOutSamples
) -> list[FullDataRow]:
    """Score the classifiers of all real training images that the store has; the linear one comes first."""
    device = held_out_samples.features.device
    heads: dict[FullDataClassifier, SingleLinearHead] = {
        "linear": read_full_data_classifier(eval_backbone.statistics, device),
        "nearest class mean": make_nearest_mean_head(
            torch.from_numpy(
                eval_backbone.statistics.read_per_class_array("train/mean").astype(np.float32)
            ).to(device)
        ),
        "discriminant": make_discriminant_head(eval_backbone.statistics, device),
    }
    scores = {
        classifier: compute_accuracy_by_seed(head, held_out_samples.features, held_out_samples.labels)
        for classifier, head in heads.items()
    }
    return [
        FullDataRow(
            backbone=eval_backbone.backbone.card.spec,
            image_size=eval_backbone.backbone.card.preprocessing.input_size,
            classifier=classifier,
            top1=score.top1[0],
            top5=None if score.top5 is None else score.top5[0],
            recovered=compute_fraction_of_full_data(score.top1[0], scores["linear"].top1[0]),
            per_class=score.mean_top1_by_class,
        )
        for classifier, score in scores.items()
    ]


def make_discriminant_head(statistics: ClassSubsetStatistics, device: torch.device) -> SingleLinearHead:
    """Compute the linear discriminant of an entry's moments."""
    discriminant = fit_linear_discriminant(statistics.read_moments())
    weight, bias = torch.from_numpy(discriminant.weight), torch.from_numpy(discriminant.bias)
    return LinearHeads(weight[None].to(device), bias[None].to(device))


def make_accuracy_row(
    eval_backbone: EvaluatedBackbone,
    image_set: ImageSet,
    mode: Mode,
    fitted_heads: FittedHeads,
    held_out_samples: HeldOutSamples,
    full_data_top1: float,
    training_options: RowTrainingOptions,
) -> AccuracyRow:
    """Score the heads that a mode trained on an image set, and average over seeds.

    Parameters
    ----------
    full_data_top1 : float
        Top-1 accuracy of the full-data classifier of the same backbone.
    training_options : RowTrainingOptions
        How the heads were trained.
    """
    score = compute_accuracy_by_seed(fitted_heads.heads, held_out_samples.features, held_out_samples.labels)
    top1_mean, top1_std = compute_mean_and_sample_std(score.top1)
    top5_mean, top5_std = (None, None) if score.top5 is None else compute_mean_and_sample_std(score.top5)
    row = AccuracyRow(
        images="none" if mode == "inherit-statistics" else image_set.name,
        backbone=eval_backbone.backbone.card.spec,
        image_size=eval_backbone.backbone.card.preprocessing.input_size,
        mode=mode,
        top1_mean=top1_mean,
        top1_std=top1_std,
        top5_mean=top5_mean,
        top5_std=top5_std,
        seeds=len(score.top1),
        top1=score.top1,
        top5=score.top5,
        recovered=compute_fraction_of_full_data(top1_mean, full_data_top1),
        exemplars=image_set.min_available_exemplars_per_class,
        chosen=image_set.exemplar_indices_by_class,
        penalty=fitted_heads.relative_ridge_penalty,
        backbone_hash=eval_backbone.backbone.card.hash,
        epochs=training_options.epochs,
        views=training_options.views,
        seed=training_options.seed,
        crop_edge=training_options.crop_edge,
        kd_temperature=training_options.kd_temperature,
        kd_weight=training_options.kd_weight,
        projector_init=training_options.projector_init,
    )
    if image_set.min_available_exemplars_per_class is not None:
        return row
    counts = compute_summed_confusion_matrix(
        fitted_heads.heads, held_out_samples.features, held_out_samples.labels
    )
    matrix = counts.tolist() if len(counts) <= MAX_CONFUSION_CLASSES else None
    return row.model_copy(
        update={
            "confusion": matrix,
            "confused": list_most_confused_pairs(counts),
            "per_class": score.mean_top1_by_class,
        }
    )


def compute_fraction_of_full_data(accuracy: float, full_data_accuracy: float) -> float | None:
    """Return an accuracy as a fraction of another; None if that is zero."""
    return accuracy / full_data_accuracy if full_data_accuracy else None


def list_most_confused_pairs(confusion_counts: Tensor) -> list[ConfusedPair]:
    """Return the pairs of classes that are confused most often, most frequent first.

    Parameters
    ----------
    confusion_counts : Tensor of int64, shape (class, class)
        From :func:`~sfm.eval.head_accuracy.compute_summed_confusion_matrix`.
    """
    errors = confusion_counts.cpu() * ~torch.eye(len(confusion_counts), dtype=torch.bool)
    order = errors.flatten().sort(descending=True, stable=True).indices[:MAX_CONFUSED_PAIRS]
    pairs = [divmod(position, len(confusion_counts)) for position in order.tolist()]
    return [
        ConfusedPair(right=right, predicted=predicted, count=int(errors[right, predicted]))
        for right, predicted in pairs
        if errors[right, predicted] > 0
    ]
