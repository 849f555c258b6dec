"""Projectors: linear maps from one backbone's features to another's, for classifier inheritance.

The classifier in the store for the distillation backbone stays fixed. Only a linear projector from the
evaluation backbone's features to the distillation backbone's is trained, on synthetic images alone.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfm.eval.config import ProjectorInit
from sfm.eval.head_accuracy import LinearHeads, SingleLinearHead
from sfm.eval.training import (
    BatchSchedule,
    CountCallback,
    ParamGroup,
    RandomStreamPurpose,
    ignore_progress_count,
    limit_torch_threads,
    train_with_adam,
)
from sfm.random_streams import make_rng

PROJECTOR_LEARNING_RATE = 1e-2
# Weights trained at a time on a CPU: they, their gradient and Adam's two moments stay in the cache,
# which is several times faster than streaming whole projectors through memory at every step.
MAX_BLOCK_WEIGHTS = 2**19


@dataclass(frozen=True)
class LinearProjectors:
    """Linear maps from one feature space to another, one per seed: ``y = weight @ x + bias``.

    Attributes
    ----------
    weight : Tensor, shape (seed, target feature, feature)
    bias : Tensor, shape (seed, target feature)
    """

    weight: Tensor
    bias: Tensor


SingleLinearProjector = LinearProjectors
"""One projector alone: the first axis has length 1."""


def init_projectors(
    projector_init: ProjectorInit, run_seed: int, seed_count: int, target_width: int, feature_width: int
) -> LinearProjectors:
    """Return one untrained projector per seed, float32 on the CPU.

    ``zero``: directions that no synthetic view shows are projected to zero, where random initial weights stay
    as noise in every held-out feature. ``default``: weights and biases uniform between +-1 / sqrt(feature
    width), as ``torch.nn.Linear`` draws them; one random stream per seed.

    Parameters
    ----------
    projector_init : {"zero", "default"}
    run_seed : int
        Seed of the run.
    seed_count, target_width, feature_width : int
    """
    if projector_init == "zero":
        return LinearProjectors(
            torch.zeros(seed_count, target_width, feature_width), torch.zeros(seed_count, target_width)
        )
    bound = 1 / math.sqrt(feature_width)
    drawn = np.stack(
        [
            make_rng(run_seed, RandomStreamPurpose.PROJECTOR, s).uniform(
                -bound, bound, size=(target_width, feature_width + 1)
            )
            for s in range(seed_count)
        ]
    )
    parameters = torch.from_numpy(drawn.astype(np.float32))
    return LinearProjectors(parameters[:, :, :-1].contiguous(), parameters[:, :, -1].contiguous())


class ProjectorGradients(NamedTuple):
    """Gradients of each seed's loss, shaped as the projectors or the part of them that is trained."""

    weight: Tensor
    bias: Tensor


def compute_projector_gradients(
    weight: Tensor, bias: Tensor, features: Tensor, target_features: Tensor, total_target_width: int
) -> ProjectorGradients:
    """Return the gradient of each seed's mean squared error, for some of the target features.

    With ``R = X W^T + b - Y`` and the mean over the batch and all `total_target_width` target features:
    ``dW = 2 R^T X / (B * target_width)``.

    Parameters
    ----------
    weight : Tensor, shape (seed, target feature, feature)
    bias : Tensor, shape (seed, target feature)
    features : Tensor, shape (seed, batch, feature)
    target_features : Tensor, shape (seed, batch, target feature)
    total_target_width : int
        Length of the whole target feature vector.
    """
    residual = torch.baddbmm(bias[:, None], features, weight.transpose(1, 2)) - target_features
    residual *= 2 / (features.shape[1] * total_target_width)
    return ProjectorGradients(residual.transpose(1, 2) @ features, residual.sum(1))


def train_projectors(
    view_features: Tensor,
    target_features: Tensor,
    schedule: BatchSchedule,
    initial_projectors: LinearProjectors,
    on_block: CountCallback = ignore_progress_count,
) -> LinearProjectors:
    """Train one projector per seed to predict a backbone's features from another's, of the same views.

    Mean squared error, Adam at 1e-2 * B / 256, cosine to zero, no weight decay; the last epoch's projector is
    returned. Seeds differ in the order of their views, and in their start unless it is zero.

    No target feature's weights enter another's loss, and Adam works on each number alone, so target features
    are trained block after block: the same projector as training all of them together.

    Parameters
    ----------
    view_features : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    target_features : Tensor, shape (image, view, target feature)
        Features of the distillation backbone, of the same views.
    schedule : BatchSchedule
    initial_projectors : LinearProjectors
        One per seed, from :func:`init_projectors`; not changed.
    on_block : callable, optional
        Called with the blocks done and their total.

    Returns
    -------
    LinearProjectors
    """
    target_width, feature_width = target_features.shape[2], view_features.shape[2]

    def train_block(block: slice) -> LinearProjectors:
        block_targets = target_features[:, :, block].contiguous()
        weight = copy_contiguous(initial_projectors.weight[:, block], view_features)
        bias = copy_contiguous(initial_projectors.bias[:, block], view_features)
        train_with_adam(
            [ParamGroup([weight, bias], PROJECTOR_LEARNING_RATE)],
            lambda image_indices, view_indices: compute_projector_gradients(
                weight,
                bias,
                view_features[image_indices, view_indices],
                block_targets[image_indices, view_indices],
                target_width,
            ),
            schedule,
            ignore_progress_count,
        )
        return LinearProjectors(weight, bias)

    blocks = split_target_features_for_cpu_cache(
        schedule.seed_count, target_width, feature_width, view_features.device
    )
    trained = []
    # One thread per block: the steps are too short to be shared.
    with limit_torch_threads(1) as threads, ThreadPoolExecutor(min(threads, len(blocks))) as executor:
        for projectors in executor.map(train_block, blocks):
            trained.append(projectors)
            on_block(len(trained), len(blocks))
    return LinearProjectors(
        torch.cat([p.weight for p in trained], 1), torch.cat([p.bias for p in trained], 1)
    )


def copy_contiguous(values: Tensor, like: Tensor) -> Tensor:
    """Return a contiguous copy of values, on the device and of the dtype of another tensor."""
    return values.to(like).clone(memory_format=torch.contiguous_format)


def split_target_features_for_cpu_cache(
    seed_count: int, target_width: int, feature_width: int, device: torch.device
) -> list[slice]:
    """Return the slices of target features to train together; on a GPU, one slice of all."""
    size = max(1, MAX_BLOCK_WEIGHTS // (seed_count * feature_width)) if device.type == "cpu" else target_width
    return [slice(start, min(start + size, target_width)) for start in range(0, target_width, size)]


def compose_projectors_with_classifier(
    projectors: LinearProjectors, target_space_classifier: SingleLinearHead
) -> LinearHeads:
    """Return heads that project, then classify: ``A (P x + p) + a = (A P) x + (A p + a)``.

    Parameters
    ----------
    projectors : LinearProjectors
    target_space_classifier : SingleLinearHead
        Of the target feature space.

    Returns
    -------
    LinearHeads
        One per projector, of the evaluation backbone's feature space.
    """
    bias = (
        projectors.bias[:, None] @ target_space_classifier.weight.transpose(1, 2)
        + target_space_classifier.bias[:, None]
    )
    return LinearHeads(target_space_classifier.weight @ projectors.weight, bias[:, 0])
