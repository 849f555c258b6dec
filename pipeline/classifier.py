"""The linear classifier of all real data: multinomial logistic regression on features streamed from disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfm.pipeline.moments import Moments
from sfm.pipeline.staging import Staged

L2_PATH = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""Penalties tried, from strong to weak; each fit starts at the one before."""

TOLERANCE = 1e-5
PATH_TOLERANCE = 1e-3
"""Fits that only choose the penalty need not be exact; the final one is held to ``TOLERANCE``."""

MOST_ITERATIONS = 1000
VALIDATION_EVERY = 10


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of raw features: ``logits = feature @ weight.T + bias``.

    Attributes
    ----------
    weight : ndarray of float32, shape (C, D)
    bias : ndarray of float32, shape (C,)
    l2 : float
    iterations : int
        Of the final fit.
    converged : bool
        Whether the largest entry of the gradient fell to ``TOLERANCE``.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    l2: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Fit:
    """Parameters on standardised features, float64: ``weight`` (C, D) and ``bias`` (C,)."""

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool


def standardisation(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per feature, float64; a constant feature has deviation 1."""
    n = moments.count.sum()
    mean = moments.count @ moments.mean / n
    between = moments.count @ (moments.mean - mean) ** 2
    std = np.sqrt((moments.scatter_diagonal.sum(axis=0) + between) / n)
    floor = 1e-6 * std.max(initial=0.0)
    return torch.from_numpy(mean), torch.from_numpy(np.where(std > floor, std, 1.0))


def on_raw_features(fit_weight: Tensor, fit_bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a classifier of ``(x - mean) / std`` as one of ``x``."""
    weight = fit_weight / std
    return weight, fit_bias - weight @ mean


def fit(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]],
    samples: int,
    mean: Tensor,
    std: Tensor,
    l2: float,
    start: Fit,
    device: torch.device,
    tolerance: float = TOLERANCE,
) -> Fit:
    """Minimise mean cross-entropy + l2/2 |W|^2 on standardised features, with L-BFGS and full gradients.

    Every evaluation streams all blocks once, so memory holds one block whatever the number of samples.
    Products are float32, sums over blocks float64.
    """
    weight = start.weight.clone().requires_grad_()
    bias = start.bias.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_ITERATIONS,
        max_eval=2 * MOST_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        raw_weight, raw_bias = on_raw_features(weight.detach(), bias.detach(), mean, std)
        w, b = raw_weight.float().to(device), raw_bias.float().to(device)
        loss = torch.zeros((), dtype=torch.float64)
        outer, total = torch.zeros_like(raw_weight), torch.zeros_like(raw_bias)
        for features, labels in blocks:
            x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).long().to(device)
            logits = torch.addmm(b, x, w.T).double()
            loss += cross_entropy(logits, y, reduction="sum").cpu()
            residual = logits.softmax(dim=1)
            residual[torch.arange(len(y), device=device), y] -= 1
            total += residual.sum(dim=0).cpu()
            outer += (residual.float().T @ x).double().cpu()
        weight.grad = (outer - torch.outer(total, mean)) / std / samples + l2 * weight.detach()
        bias.grad = total / samples
        return loss / samples + l2 / 2 * weight.detach().square().sum()

    optimiser.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert bias.grad is not None
    steepest = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    iterations = int(optimiser.state[weight]["n_iter"])
    return Fit(weight.detach(), bias.detach(), iterations, steepest <= tolerance)


def mean_cross_entropy(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]],
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> float:
    """Return the mean cross-entropy of a classifier of raw features."""
    loss, n = 0.0, 0
    for features, labels in blocks:
        logits = torch.from_numpy(features @ weight.T + bias)
        loss += cross_entropy(logits.double(), torch.from_numpy(labels).long(), reduction="sum").item()
        n += len(labels)
    return loss / n


def every_nth(labels: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.bool_]:
    """Mark every n-th sample of each class, in order; a class with fewer than n samples has none marked."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    marked = np.zeros(len(labels), dtype=bool)
    marked[order] = rank % n == n - 1
    return marked


def train_classifier(
    train: Staged, moments: Moments, device: torch.device, path: Sequence[float] = L2_PATH
) -> Classifier:
    """Choose the L2 penalty on every tenth training sample of a class, then fit on all of them.

    The path from strong to weak penalties ends when the validation loss has risen twice.

    Parameters
    ----------
    train : Staged
        Training features and labels.
    moments : Moments
        Of the same samples; they standardise the features.
    device : torch.device
        Where products are computed.
    """
    mean, std = standardisation(moments)
    classes, features = moments.mean.shape
    zero = Fit(
        torch.zeros(classes, features, dtype=torch.float64),
        torch.zeros(classes, dtype=torch.float64),
        0,
        False,
    )
    labels = train.all_labels()
    held = every_nth(labels, VALIDATION_EVERY)
    best_l2, best_start = path[len(path) // 2], zero
    if held.any():
        fitting, validation = train.only(~held), train.only(held)
        best_loss, rises, current = float("inf"), 0, zero
        for l2 in path:
            current = fit(fitting, int((~held).sum()), mean, std, l2, current, device, PATH_TOLERANCE)
            weight, bias = on_raw_features(current.weight, current.bias, mean, std)
            loss = mean_cross_entropy(validation, weight.float().numpy(), bias.float().numpy())
            if loss < best_loss:
                best_loss, best_l2, best_start, rises = loss, l2, current, 0
            else:
                rises += 1
                if rises == 2:
                    break
    final = fit(train, len(labels), mean, std, best_l2, best_start, device)
    weight, bias = on_raw_features(final.weight, final.bias, mean, std)
    return Classifier(
        weight.float().numpy(), bias.float().numpy(), best_l2, final.iterations, final.converged
    )


def accuracies(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]], classifier: Classifier
) -> tuple[float, float | None]:
    """Return top-1 and top-5 accuracy as fractions; top-5 is None with fewer than five classes."""
    right = np.zeros(2)
    n = 0
    for features, labels in blocks:
        logits = features @ classifier.weight.T + classifier.bias
        own = logits[np.arange(len(labels)), labels]
        better = (logits > own[:, None]).sum(axis=1)
        right += (better < 1).sum(), (better < 5).sum()
        n += len(labels)
    return float(right[0] / n), float(right[1] / n) if len(classifier.bias) >= 5 else None
