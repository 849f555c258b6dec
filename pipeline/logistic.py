"""Multinomial logistic regression with a given L2 penalty, on features streamed from disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfm.pipeline.equipment import cores, single_threaded
from sfm.pipeline.moments import Moments
from sfm.pipeline.staging import Staged
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.stats_store.eigen import decompose_symmetric

TOLERANCE = 1e-3
"""Largest entry of the gradient, times the number of classes; it is of order 1 at zero weights."""

MOST_ITERATIONS = 1000
HISTORY = 20

KEPT_BYTES = 3 * 2**29
"""Standardised rows are kept in memory up to this size; larger sets are read again in every pass."""

PRECISE_ROWS = 4096
"""Up to so many rows are in double precision: next to a strong penalty, single precision hides the loss."""

AHEAD = 2
"""Pieces that wait, or whose sums do, per core."""

PIECE_ROWS = 1024
"""Rows that one core takes at a time in a pass; what is summed up in which order depends on it."""

T = TypeVar("T")
U = TypeVar("U")

PassCallback = Callable[[int], None]
"""Told after every pass how many rows it was over."""


def ignore_pass(_: int) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Fit:
    """Parameters on standardised features, float64: ``weight`` (C, D) and ``bias`` (C,)."""

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool


def zero_fit(classes: int, features: int) -> Fit:
    """Return the classifier that knows nothing."""
    weight = torch.zeros(classes, features, dtype=torch.float64)
    return Fit(weight, torch.zeros(classes, dtype=torch.float64), 0, False)


@dataclass(frozen=True)
class Spread:
    """How features are spread; all float64.

    Attributes
    ----------
    mean, std : Tensor, shape (D,)
        What standardising subtracts from a feature, and divides it by.
    variance : Tensor, shape (r,)
        Of the standardised features along each of the axes.
    axes : Tensor, shape (D, r)
        Principal axes of the standardised features, in columns; those without any extent may be left out.
    common_scale : bool
        Whether all features are divided by the same number.
    """

    mean: Tensor
    std: Tensor
    variance: Tensor
    axes: Tensor
    common_scale: bool = False


def spread_of(moments: Moments, *, common_scale: bool = False, all_axes: bool = True) -> Spread:
    """Return the spread of all samples that moments are of.

    Parameters
    ----------
    moments : Moments
    common_scale : bool
        Divide all features by the root of their mean variance, not each by its own deviation. Deviations
        of few samples are noise.
    all_axes : bool
        Keep axes along which these samples have no extent; others (views of them) may have some.
    """
    with ThreadpoolController().select(user_api="blas").limit(limits=1):
        return _spread_of(moments, common_scale, all_axes)


def _spread_of(moments: Moments, common_scale: bool, all_axes: bool) -> Spread:
    n = moments.count.sum()
    mean = moments.count @ moments.mean / n
    apart = moments.mean - mean
    scatter = moments.within_scatter + (apart * moments.count[:, None]).T @ apart
    own = np.sqrt(np.diagonal(scatter) / n)
    varies = own > 1e-6 * own.max(initial=0.0)
    std = np.where(varies, own, 1.0)
    if common_scale and varies.any():
        std = np.full_like(own, np.sqrt(np.square(own).mean()))
    scatter = np.where(varies & varies[:, None], scatter / n / np.outer(std, std), 0.0)
    variance, axes = principal_axes(scatter)
    if not all_axes:
        extent = variance > 1e-10 * variance.max(initial=0.0)
        variance, axes = variance[extent], axes[:, extent]
    return Spread(
        mean=torch.from_numpy(mean),
        std=torch.from_numpy(std),
        variance=torch.from_numpy(variance),
        axes=torch.from_numpy(np.ascontiguousarray(axes)),
        common_scale=common_scale,
    )


def principal_axes(
    scatter: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return variances and axes of a scatter matrix; the coordinate axes if it cannot be decomposed.

    The axes only make the search quick: any orthonormal ones lead to the same classifier.
    """
    try:
        variance, axes = decompose_symmetric(scatter)
    except np.linalg.LinAlgError:
        variance, axes = np.diagonal(scatter), np.eye(len(scatter))
    return np.maximum(variance, 0.0), axes


def on_raw_features(weight: Tensor, bias: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """Rewrite a classifier of ``(x - mean) / std`` as one of ``x``."""
    raw = weight / spread.std
    return raw, bias - raw @ spread.mean


@dataclass(frozen=True)
class Standardised:
    """Standardised rows on a device, made again from the disk in every pass.

    Iterating yields (features, labels) of at most ``BLOCK_ROWS`` samples: `dtype` (n, D) and int64 (n,).
    """

    staged: Sequence[Staged]
    spread: Spread
    device: torch.device
    dtype: torch.dtype = torch.float32

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, scale = (t.to(self.device, self.dtype) for t in (self.spread.mean, 1 / self.spread.std))
        for features, labels in chain.from_iterable(self.staged):
            for start in range(0, len(labels), BLOCK_ROWS):
                own = slice(start, start + BLOCK_ROWS)
                rows = torch.from_numpy(features[own]).to(self.device, self.dtype)
                yield (rows - mean).mul_(scale), torch.from_numpy(labels[own]).long().to(self.device)


def standardised(
    staged: Sequence[Staged], samples: int, spread: Spread, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return standardised rows that can be passed over again and again; kept where they fit."""
    dtype = torch.float64 if samples <= PRECISE_ROWS else torch.float32
    rows = Standardised(staged, spread, device, dtype)
    most = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else KEPT_BYTES
    return list(rows) if 4 * samples * len(spread.mean) <= most else rows


@contextmanager
def workers_of(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """Provide threads for pieces of a pass, as many as torch has, while each operation uses one alone.

    What is summed up in which order then depends on the rows only: no bit of the result depends on how many
    cores or threads there are. None on a GPU, and for one thread.
    """
    count = torch.get_num_threads()
    # OpenBLAS' threads spin after each of scipy's small products, too, which would make the passes take three
    # times as long.
    with ThreadpoolController().select(user_api="blas").limit(limits=1), single_threaded():
        if device.type != "cpu" or count == 1:
            yield None
            return
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers


def map_in_order(
    workers: ThreadPoolExecutor | None, call: Callable[[T], U], items: Iterable[T]
) -> Iterator[U]:
    """Yield what a function makes of items, in their order; only a few are ahead of who takes them."""
    if workers is None:
        yield from map(call, items)
        return
    waiting: deque[Future[U]] = deque()
    for item in items:
        waiting.append(workers.submit(call, item))
        if len(waiting) > AHEAD * cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def cut_pieces(rows: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut blocks of rows into pieces for one core each."""
    for x, y in rows:
        yield from zip(torch.split(x, PIECE_ROWS), torch.split(y, PIECE_ROWS), strict=True)


def cross_entropy_and_gradient(
    rows: Iterable[tuple[Tensor, Tensor]],
    samples: int,
    weight: Tensor,
    bias: Tensor,
    device: torch.device,
    workers: ThreadPoolExecutor | None = None,
) -> tuple[float, Tensor, Tensor]:
    """Return the mean cross-entropy and its gradient, float64, in one pass over the rows.

    Products and softmax are of the rows' precision, sums over pieces float64.

    Parameters
    ----------
    workers : ThreadPoolExecutor, optional
        As :func:`workers_of` gives it.
    """
    w, b = weight.to(device), bias.to(device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    outer, total = torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)

    def sums_of(piece: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = piece
        log_likelihood = torch.addmm(b.to(x.dtype), x, w.to(x.dtype).T).log_softmax(dim=1)
        likelihood = log_likelihood.gather(1, y[:, None]).sum(dtype=torch.float64)
        residual = log_likelihood.exp_()
        residual[torch.arange(len(y), device=device), y] -= 1
        return likelihood, residual.T @ x, residual.sum(dim=0, dtype=torch.float64)

    pieces = cut_pieces(rows) if device.type == "cpu" else rows
    for likelihood, own_outer, own_total in map_in_order(workers, sums_of, pieces):
        loss -= likelihood
        total += own_total
        outer += own_outer
    return loss.item() / samples, outer.cpu() / samples, total.cpu() / samples


def fit(
    rows: Iterable[tuple[Tensor, Tensor]],
    samples: int,
    spread: Spread,
    l2: float,
    start: Fit,
    device: torch.device,
    tolerance: float = TOLERANCE,
    on_pass: PassCallback = ignore_pass,
    prior: Fit | None = None,
    iterations: int | None = None,
) -> Fit:
    """Minimise mean cross-entropy + l2/2 |W - P|^2 on standardised features, with L-BFGS and full gradients.

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
        Where to start; its weights are taken along the axes that the spread has.
    device : torch.device
        Where the rows are.
    tolerance : float
        Of the largest entry of the gradient, times C.
    on_pass : callable, optional
    prior : Fit, optional
        Its weights are P, and its biases are penalised alike; else P is zero, and biases are free.
    iterations : int, optional
        The most that it may take; default ``MOST_ITERATIONS``.
    """
    bias_l2 = l2 if prior else 0.0
    prior = prior or zero_fit(*start.weight.shape)
    classes, extent = len(start.bias), len(spread.variance)
    stretch = (spread.variance / classes + l2).rsqrt()
    bias_stretch = (1 / classes + bias_l2) ** -0.5
    steepest = float("inf")
    iterations = iterations or MOST_ITERATIONS

    def parameters(point: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        inner = torch.from_numpy(point[:-classes]).view(classes, extent)
        weight = prior.weight + (inner * stretch) @ spread.axes.T
        return weight, prior.bias + torch.from_numpy(point[-classes:]) * bias_stretch

    def loss_and_gradient(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        nonlocal steepest
        weight, bias = parameters(point)
        loss, outer, total = cross_entropy_and_gradient(rows, samples, weight, bias, device, workers)
        on_pass(samples)
        away, bias_away = weight - prior.weight, bias - prior.bias
        outer += l2 * away
        total += bias_l2 * bias_away
        steepest = classes * max(outer.abs().max().item(), total.abs().max().item())
        inner = (outer @ spread.axes) * stretch
        gradient: npt.NDArray[np.float64] = torch.cat([inner.flatten(), total * bias_stretch]).numpy()
        penalty = l2 * away.square().sum().item() + bias_l2 * bias_away.square().sum().item()
        return loss + penalty / 2, gradient

    def stop_at_the_tolerance(_: npt.NDArray[np.float64]) -> None:
        if steepest <= tolerance:
            raise StopIteration

    with workers_of(device) as workers:
        inner = ((start.weight - prior.weight) @ spread.axes) / stretch
        found = minimize(
            loss_and_gradient,
            torch.cat([inner.flatten(), (start.bias - prior.bias) / bias_stretch]).numpy(),
            jac=True,
            method="L-BFGS-B",
            callback=stop_at_the_tolerance,
            options={
                "maxcor": HISTORY,
                "maxiter": iterations,
                "maxfun": 2 * iterations,
                "ftol": 0,
                "gtol": 0,
            },
        )
        if steepest > tolerance:
            # The search may have ended at a point before the one that it tried last.
            loss_and_gradient(found.x)
        return Fit(*parameters(found.x), int(found.nit), steepest <= tolerance)


def cross_entropies(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]],
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Return the cross-entropy of a classifier of raw features on every sample."""
    found = [np.zeros(0)]
    with ThreadpoolController().select(user_api="blas").limit(limits=1), single_threaded():
        for features, labels in blocks:
            logits = torch.from_numpy(features @ weight.T + bias).double()
            found.append(cross_entropy(logits, torch.from_numpy(labels).long(), reduction="none").numpy())
    return np.concatenate(found)
