"""Classifier inheritance: the full-data classifier of another backbone, behind a trained projector.

The classifier that the store holds for the distillation backbone stays as it is. Only a linear projector from
the evaluation backbone's features to the distillation backbone's is trained, on synthetic images alone
(design, section 6).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sfm.eval.accuracy import Heads
from sfm.eval.training import Group, Plan, Told, at_most_threads, descend, nobody_told

RATE = 1e-2
# Weights trained at a time on a CPU: they, their gradient and Adam's two moments then stay in the cache,
# which is several times faster than streaming whole projectors through memory at every step.
BLOCK_WEIGHTS = 2**19


@dataclass(frozen=True)
class Projectors:
    """Linear maps from one feature space to another, one per seed: ``y = weight @ x + bias``.

    Attributes
    ----------
    weight : Tensor, shape (seed, target feature, feature)
    bias : Tensor, shape (seed, target feature)
    """

    weight: Tensor
    bias: Tensor


def projector_gradients(
    weight: Tensor, bias: Tensor, features: Tensor, targets: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of each seed's mean squared error, for some of the target features.

    With ``R = X W^T + b - Y`` and the mean over the batch and all `width` target features:
    ``dW = 2 R^T X / (B * width)``.

    Parameters
    ----------
    weight : Tensor, shape (seed, target feature, feature)
    bias : Tensor, shape (seed, target feature)
    features : Tensor, shape (seed, batch, feature)
    targets : Tensor, shape (seed, batch, target feature)
    width : int
        Length of the whole target feature vector.

    Returns
    -------
    tuple of Tensor
        Shapes of `weight` and `bias`.
    """
    residual = torch.baddbmm(bias[:, None], features, weight.transpose(1, 2)) - targets
    residual *= 2 / (features.shape[1] * width)
    return residual.transpose(1, 2) @ features, residual.sum(1)


def train_projectors(pool: Tensor, targets: Tensor, plan: Plan, on_block: Told = nobody_told) -> Projectors:
    """Train one projector per seed to predict a backbone's features from another's, of the same views.

    Mean squared error, Adam at 1e-2 * B / 256, cosine to zero, no weight decay; the last epoch's projector is
    returned. It starts at zero: what no synthetic view shows is then projected to nothing, where random
    initial weights would stay there as noise in every held-out feature. Seeds differ in the views they see.

    No target feature's weights enter another's loss, and Adam works on each number alone, so target features
    are trained block after block: the same projector as training all of them together.

    Parameters
    ----------
    pool : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    targets : Tensor, shape (image, view, target feature)
        Features of the distillation backbone, of the same views.
    plan : Plan
        Which image and which view each seed sees when.
    on_block : callable, optional
        Told the blocks done and how many there are.

    Returns
    -------
    Projectors
    """
    width, features = targets.shape[2], pool.shape[2]

    def train(some: slice) -> Projectors:
        wanted = targets[:, :, some].contiguous()
        weight = pool.new_zeros((plan.seeds, wanted.shape[2], features))
        bias = pool.new_zeros((plan.seeds, wanted.shape[2]))
        descend(
            [Group([weight, bias], RATE)],
            lambda rows, looks: projector_gradients(
                weight, bias, pool[rows, looks], wanted[rows, looks], width
            ),
            plan,
            nobody_told,
        )
        return Projectors(weight, bias)

    some = blocks(plan.seeds, width, features, pool.device)
    parts = []
    # One thread per block: the steps are too short to be shared.
    with at_most_threads(1) as threads, ThreadPoolExecutor(min(threads, len(some))) as workers:
        for part in workers.map(train, some):
            parts.append(part)
            on_block(len(parts), len(some))
    return Projectors(torch.cat([p.weight for p in parts], 1), torch.cat([p.bias for p in parts], 1))


def blocks(seeds: int, width: int, features: int, device: torch.device) -> list[slice]:
    """Return which target features of projectors to train together: on a GPU, all of them."""
    step = max(1, BLOCK_WEIGHTS // (seeds * features)) if device.type == "cpu" else width
    return [slice(i, min(i + step, width)) for i in range(0, width, step)]


def inherited_heads(projectors: Projectors, classifier: Heads) -> Heads:
    """Compose projectors with the inherited classifier: ``A (P x + p) + a = (A P) x + (A p + a)``.

    Parameters
    ----------
    projectors : Projectors
    classifier : Heads
        One, of the target feature space.

    Returns
    -------
    Heads
        One per projector, of the evaluation backbone's feature space.
    """
    bias = projectors.bias[:, None] @ classifier.weight.transpose(1, 2) + classifier.bias[:, None]
    return Heads(classifier.weight @ projectors.weight, bias[:, 0])
