"""The linear classifier of all real data: multinomial logistic regression on features streamed from disk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfm.pipeline.moments import Moments
from sfm.pipeline.staging import Staged
from sfm.stats_store.digest import BLOCK_ROWS

L2_PATH = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""Penalties tried, from strong to weak; each fit starts at the one before."""

TOLERANCE = 1e-4
"""Largest entry of the gradient, times the number of classes; it is of order 1 at zero weights."""

PATH_TOLERANCE = 1e-2
"""Fits that only choose the penalty need not be exact; the final one is held to ``TOLERANCE``."""

MOST_ITERATIONS = 1000
HISTORY = 20
VALIDATION_EVERY = 10

CHOOSING_ROWS = 131_072
"""Of more samples than these, as many of each class choose the penalty."""

KEPT_BYTES = 3 * 2**29
"""Standardised rows are kept in memory up to this size; larger sets are read again in every pass."""


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
        Whether the largest entry of the gradient, times C, fell to ``TOLERANCE``.
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


@dataclass(frozen=True)
class Spread:
    """How features are spread; all float64.

    Attributes
    ----------
    mean, std : Tensor, shape (D,)
        Per feature; a constant feature has deviation 1.
    variance : Tensor, shape (D,)
        Of the standardised features along each of the axes.
    axes : Tensor, shape (D, D)
        Principal axes of the standardised features, in columns.
    """

    mean: Tensor
    std: Tensor
    variance: Tensor
    axes: Tensor


def spread_of(moments: Moments) -> Spread:
    """Return the spread of all samples that moments are of."""
    n = moments.count.sum()
    mean = moments.count @ moments.mean / n
    apart = moments.mean - mean
    scatter = moments.within_scatter + (apart * moments.count[:, None]).T @ apart
    std = np.sqrt(np.diagonal(scatter) / n)
    std = np.where(std > 1e-6 * std.max(initial=0.0), std, 1.0)
    variance, axes = torch.linalg.eigh(torch.from_numpy(scatter / n / np.outer(std, std)))
    return Spread(torch.from_numpy(mean), torch.from_numpy(std), variance.clamp(min=0), axes)


def on_raw_features(weight: Tensor, bias: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """Rewrite a classifier of ``(x - mean) / std`` as one of ``x``."""
    raw = weight / spread.std
    return raw, bias - raw @ spread.mean


@dataclass(frozen=True)
class Standardised:
    """Standardised rows on a device, made again from the disk in every pass.

    Iterating yields (features, labels) of at most ``BLOCK_ROWS`` samples: float32 (n, D) and int64 (n,).
    """

    staged: Sequence[Staged]
    spread: Spread
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, scale = (t.float().to(self.device) for t in (self.spread.mean, 1 / self.spread.std))
        for features, labels in chain.from_iterable(self.staged):
            for start in range(0, len(labels), BLOCK_ROWS):
                own = slice(start, start + BLOCK_ROWS)
                rows = torch.from_numpy(features[own]).to(self.device)
                yield (rows - mean).mul_(scale), torch.from_numpy(labels[own]).long().to(self.device)


def standardised(
    staged: Sequence[Staged], samples: int, spread: Spread, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return standardised rows that can be passed over again and again; kept where they fit."""
    rows = Standardised(staged, spread, device)
    most = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else KEPT_BYTES
    return list(rows) if 4 * samples * len(spread.mean) <= most else rows


def cross_entropy_and_gradient(
    rows: Iterable[tuple[Tensor, Tensor]], samples: int, weight: Tensor, bias: Tensor, device: torch.device
) -> tuple[float, Tensor, Tensor]:
    """Return the mean cross-entropy and its gradient, float64, in one pass over the rows.

    Products and softmax are float32, sums over blocks float64.
    """
    w, b = weight.float().to(device), bias.float().to(device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    outer, total = torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    for x, y in rows:
        log_likelihood = torch.addmm(b, x, w.T).log_softmax(dim=1)
        loss -= log_likelihood.gather(1, y[:, None]).sum(dtype=torch.float64)
        residual = log_likelihood.exp_()
        residual[torch.arange(len(y), device=device), y] -= 1
        total += residual.sum(dim=0, dtype=torch.float64)
        outer += residual.T @ x
    return loss.item() / samples, outer.cpu() / samples, total.cpu() / samples


def fit(
    rows: Iterable[tuple[Tensor, Tensor]],
    samples: int,
    spread: Spread,
    l2: float,
    start: Fit,
    device: torch.device,
    tolerance: float = TOLERANCE,
) -> Fit:
    """Minimise mean cross-entropy + l2/2 |W|^2 on standardised features, with L-BFGS and full gradients.

    Every evaluation passes over all rows once. The search runs in coordinates in which the curvature at zero
    weights, ``variance / C + l2`` along the principal axes, is the identity; that more than halves the
    passes.

    Parameters
    ----------
    rows : iterable of (features, labels)
        Standardised; see ``standardised``.
    samples : int
        How many rows there are.
    spread : Spread
    l2 : float
    start : Fit
        Where to start.
    device : torch.device
        Where the rows are.
    tolerance : float
        Of the largest entry of the gradient, times C.
    """
    classes, features = start.weight.shape
    stretch = (spread.variance / classes + l2).rsqrt()
    bias_stretch = classes**0.5
    steepest = float("inf")

    def parameters(point: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        inner = torch.from_numpy(point[:-classes]).view(classes, features)
        return (inner * stretch) @ spread.axes.T, torch.from_numpy(point[-classes:]) * bias_stretch

    def loss_and_gradient(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        nonlocal steepest
        weight, bias = parameters(point)
        loss, outer, total = cross_entropy_and_gradient(rows, samples, weight, bias, device)
        outer += l2 * weight
        steepest = classes * max(outer.abs().max().item(), total.abs().max().item())
        inner = (outer @ spread.axes) * stretch
        gradient: npt.NDArray[np.float64] = torch.cat([inner.flatten(), total * bias_stretch]).numpy()
        return loss + l2 / 2 * weight.square().sum().item(), gradient

    def stop_at_the_tolerance(_: npt.NDArray[np.float64]) -> None:
        if steepest <= tolerance:
            raise StopIteration

    inner = (start.weight @ spread.axes) / stretch
    found = minimize(
        loss_and_gradient,
        torch.cat([inner.flatten(), start.bias / bias_stretch]).numpy(),
        jac=True,
        method="L-BFGS-B",
        callback=stop_at_the_tolerance,
        options={
            "maxcor": HISTORY,
            "maxiter": MOST_ITERATIONS,
            "maxfun": 2 * MOST_ITERATIONS,
            "ftol": 0,
            "gtol": 0,
        },
    )
    return Fit(*parameters(found.x), int(found.nit), steepest <= tolerance)


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


def rank_and_count(labels: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return, per sample, how many of its class come before it, and how many there are."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts[labels]


def every_nth(labels: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.bool_]:
    """Mark every n-th sample of each class, in order; a class with fewer than n samples has none marked."""
    rank, _ = rank_and_count(labels)
    marked: npt.NDArray[np.bool_] = rank % n == n - 1
    return marked


def at_most(labels: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.bool_]:
    """Mark n samples of each class, evenly spaced in order; all of a class that has no more."""
    rank, count = rank_and_count(labels)
    marked: npt.NDArray[np.bool_] = (rank + 1) * n // count > rank * n // count
    return marked


def choose_penalty(
    looks: Sequence[Staged],
    labels: npt.NDArray[np.int32],
    spread: Spread,
    device: torch.device,
    zero: Fit,
    path: Sequence[float],
) -> tuple[float, Fit]:
    """Return the penalty with the least cross-entropy on every tenth sample of a class, and its fit.

    The path from strong to weak penalties ends when that loss rises. With no class of ten samples, the
    penalty in the middle of the path is taken. Images that validate do so without their views, which no fit
    sees either.
    """
    held = every_nth(labels, VALIDATION_EVERY)
    if not held.any():
        return path[len(path) // 2], zero
    samples = len(looks) * int((~held).sum())
    rows = standardised([look.only(~held) for look in looks], samples, spread, device)
    validation = looks[0].only(held)
    best_loss, best_l2, best = float("inf"), path[0], zero
    for l2 in path:
        current = fit(rows, samples, spread, l2, best, device, PATH_TOLERANCE)
        weight, bias = on_raw_features(current.weight, current.bias, spread)
        loss = mean_cross_entropy(validation, weight.float().numpy(), bias.float().numpy())
        if loss >= best_loss:
            break
        best_loss, best_l2, best = loss, l2, current
    return best_l2, best


def train_classifier(
    train: Staged,
    moments: Moments,
    device: torch.device,
    views: Sequence[Staged] = (),
    path: Sequence[float] = L2_PATH,
) -> Classifier:
    """Choose the L2 penalty on a part of the training samples, then fit on all of them.

    Of more than ``CHOOSING_ROWS`` samples, an equal number of each class choose it. The penalty on the mean
    loss then shrinks as one over the number of samples, as the weight of a fixed prior does.

    Parameters
    ----------
    train : Staged
        Training features and labels.
    moments : Moments
        Of the same samples; they standardise the features.
    device : torch.device
        Where products are computed.
    views : sequence of Staged
        Features of augmented views of the same samples, in the same order; the classifier learns from them
        too.
    """
    looks = [train, *views]
    spread = spread_of(moments)
    classes, features = moments.mean.shape
    zero = Fit(
        torch.zeros(classes, features, dtype=torch.float64),
        torch.zeros(classes, dtype=torch.float64),
        0,
        False,
    )
    labels = train.all_labels()
    samples = len(looks) * len(labels)
    choosing, share = looks, 1.0
    if samples > CHOOSING_ROWS:
        some = at_most(labels, max(VALIDATION_EVERY, CHOOSING_ROWS // (classes * len(looks))))
        choosing, share = [look.only(some) for look in looks], float(some.mean())
    l2, start = choose_penalty(choosing, choosing[0].all_labels(), spread, device, zero, path)
    l2 *= share
    rows = standardised(looks, samples, spread, device)
    final = fit(rows, samples, spread, l2, start, device)
    weight, bias = on_raw_features(final.weight, final.bias, spread)
    return Classifier(weight.float().numpy(), bias.float().numpy(), l2, final.iterations, final.converged)


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
