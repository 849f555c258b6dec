"""Train the linear classifier as published: a few epochs of Adam on augmented views, without a penalty."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.execution.determinism import tf32_disabled
from sfm.pipeline.extract_config import ADAM_EPOCHS
from sfm.pipeline.linear_classifier import LinearClassifier
from sfm.pipeline.logistic import PassRowsCallback, ignore_pass_rows
from sfm.pipeline.runtime import one_torch_thread
from sfm.pipeline.staged_features import StagedFeatures
from sfm.random_streams import make_rng

ADAM_BATCH_SIZE = 128
LEARNING_RATE_AT_BATCH_256 = 1e-3
INITIAL_WEIGHT_STD = 0.01

ADAM_STREAM = 6
"""Purpose of the random streams: position 0 draws the initial weights, 1 + epoch the order of an epoch."""

MAX_SHUFFLED_BYTES = 2**29
"""Features that are shuffled together; larger sets are read in random order of their partitions."""


def train_classifier_with_adam(
    view_features: Sequence[StagedFeatures],
    class_count: int,
    feature_count: int,
    seed: int,
    device: torch.device,
    report_pass_rows: PassRowsCallback = ignore_pass_rows,
    max_shuffled_bytes: int = MAX_SHUFFLED_BYTES,
) -> LinearClassifier:
    """Minimise the cross-entropy on augmented views with Adam, 10 epochs in batches of 128.

    The learning rate is 1e-3 * 128 / 256. Features are raw, and nothing is chosen on a part of the samples.
    Every epoch shows every sample once, through the next of its views. Weights start at N(0, 0.01), biases
    at zero, and the learning rate falls to zero along a cosine, as in the mode ``linear`` of an evaluation.
    One thread computes: no bit depends on the number of threads.

    Parameters
    ----------
    view_features : sequence of StagedFeatures
        Features of each augmented view of the training samples; without those of the images themselves.
    class_count, feature_count : int
    seed : int
        Seed of the extraction.
    device : torch.device
        Where products are computed.
    report_pass_rows : callable, optional
        Called after every epoch with the number of its rows.
    max_shuffled_bytes : int
        Memory of the rows that are shuffled together.

    Returns
    -------
    LinearClassifier
        Of raw features; ``converged`` is False, since there is no tolerance.
    """
    if not view_features:
        raise ValueError("Adam trains on augmented views, and there are none")
    initial_weight = make_rng(seed, ADAM_STREAM, 0).standard_normal((class_count, feature_count))
    weight = torch.from_numpy((INITIAL_WEIGHT_STD * initial_weight).astype(np.float32)).to(device)
    bias = torch.zeros(class_count, device=device)
    optimizer = torch.optim.Adam(
        [weight, bias], lr=LEARNING_RATE_AT_BATCH_256 * ADAM_BATCH_SIZE / 256, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=ADAM_EPOCHS)
    max_rows = max(ADAM_BATCH_SIZE, max_shuffled_bytes // (4 * feature_count))
    step_count = 0
    with one_torch_thread(), tf32_disabled():
        for epoch in range(ADAM_EPOCHS):
            view, row_count = view_features[epoch % len(view_features)], 0
            for rows, labels in iterate_shuffled_batches(
                view, make_rng(seed, ADAM_STREAM, 1 + epoch), ADAM_BATCH_SIZE, max_rows
            ):
                weight.grad, bias.grad = compute_cross_entropy_gradients(
                    weight,
                    bias,
                    torch.from_numpy(rows).to(device),
                    torch.from_numpy(labels).long().to(device),
                )
                optimizer.step()
                step_count += 1
                row_count += len(rows)
            scheduler.step()
            report_pass_rows(row_count)
    return LinearClassifier(
        weight.cpu().numpy(),
        bias.cpu().numpy(),
        l2=0.0,
        iterations=step_count,
        converged=False,
        solver_description=(
            f"softmax regression, Adam, learning rate 1e-3 * {ADAM_BATCH_SIZE} / 256, {ADAM_EPOCHS} epochs, "
            f"{len(view_features)} augmented views of each image, raw features, no penalty"
        ),
    )


def compute_cross_entropy_gradients(
    weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the mean cross-entropy by weight (C, D) and bias (C,)."""
    error = torch.addmm(bias, features, weight.T).softmax(1)
    error[torch.arange(len(labels), device=labels.device), labels] -= 1
    error /= len(labels)
    return error.T @ features, error.sum(0)


def iterate_shuffled_batches(
    features: StagedFeatures, rng: np.random.Generator, batch_size: int, max_rows_in_memory: int
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
    """Yield all rows and their labels once, in random order, in batches; only the last may be shorter.

    Partitions are read in random order. Those that fit in memory together are shuffled together: all of
    them, unless the set is larger.
    """
    order = rng.permutation(len(features.files))
    held: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]] = []
    for position, number in enumerate(order):
        held.append(features.read_partition(int(number)))
        is_last = position == len(order) - 1
        if not is_last and sum(len(labels) for _, labels in held) < max_rows_in_memory:
            continue
        rows = np.concatenate([rows for rows, _ in held])
        labels = np.concatenate([labels for _, labels in held])
        shuffled = rng.permutation(len(labels))
        end = len(labels) if is_last else len(labels) - len(labels) % batch_size
        for start in range(0, end, batch_size):
            batch = shuffled[start : min(start + batch_size, end)]
            yield rows[batch], labels[batch]
        held = [(rows[shuffled[end:]], labels[shuffled[end:]])]
