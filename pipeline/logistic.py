"""Multinomial logistic regression with a given L2 penalty, on rows that are streamed from disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfm.pipeline.feature_scaling import FeaturesAndLabels, FeatureScaling
from sfm.pipeline.runtime import count_cores, find_blas_libraries, one_torch_thread

GRADIENT_TOLERANCE = 1e-3
"""Largest entry of the gradient, times the number of classes; it is of order 1 at zero weights."""

MAX_LBFGS_ITERATIONS = 1000
LBFGS_HISTORY = 20

MAX_PENDING_PER_CORE = 2
"""Maximum number of pending pieces per core."""

PIECE_ROWS = 1024
"""Rows that one core takes at a time in a pass; the order of sums depends on it."""

T = TypeVar("T")
U = TypeVar("U")

PassRowsCallback = Callable[[int], None]
"""Called after every pass with its number of rows."""


def ignore_pass_rows(_: int) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class LogisticFit:
    """Parameters on standardised features, float64: ``weight`` (C, D) and ``bias`` (C,)."""

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool


def make_zero_fit(class_count: int, feature_count: int) -> LogisticFit:
    """Return the classifier whose weights and biases are zero."""
    weight = torch.zeros(class_count, feature_count, dtype=torch.float64)
    return LogisticFit(weight, torch.zeros(class_count, dtype=torch.float64), 0, False)


@contextmanager
def deterministic_thread_pool(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """Start as many threads as torch has, each of which computes single-threaded; None on a GPU.

    The order of sums then depends on the rows only: no bit of a result depends on the number of cores or
    threads. Also None with a single thread.
    """
    count = torch.get_num_threads()
    # OpenBLAS' threads spin after each of scipy's small products, too: passes would take three times as long.
    with find_blas_libraries().limit(limits=1), one_torch_thread():
        if device.type != "cpu" or count == 1:
            yield None
            return
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads


def map_in_order(
    thread_pool: ThreadPoolExecutor | None, function: Callable[[T], U], items: Iterable[T]
) -> Iterator[U]:
    """Map a function over items in threads, in order, with a bounded number of pending results."""
    if thread_pool is None:
        yield from map(function, items)
        return
    pending: deque[Future[U]] = deque()
    for item in items:
        pending.append(thread_pool.submit(function, item))
        if len(pending) > MAX_PENDING_PER_CORE * count_cores():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def split_rows_into_pieces(rows: Iterable[FeaturesAndLabels]) -> Iterator[FeaturesAndLabels]:
    """Split blocks of rows into pieces for one core each."""
    for x, y in rows:
        yield from zip(torch.split(x, PIECE_ROWS), torch.split(y, PIECE_ROWS), strict=True)


def compute_loss_and_gradients(
    rows: Iterable[FeaturesAndLabels],
    sample_count: int,
    weight: Tensor,
    bias: Tensor,
    device: torch.device,
    thread_pool: ThreadPoolExecutor | None = None,
) -> tuple[float, Tensor, Tensor]:
    """Return the mean cross-entropy and its gradients by weight and bias, float64, in one pass over the rows.

    Products and softmax have the rows' precision, sums over pieces float64.

    Parameters
    ----------
    thread_pool : ThreadPoolExecutor, optional
        As :func:`deterministic_thread_pool` yields it.
    """
    w, b = weight.to(device), bias.to(device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    weight_gradient = torch.zeros_like(w, dtype=torch.float64)
    bias_gradient = torch.zeros_like(b, dtype=torch.float64)

    def compute_sums(piece: FeaturesAndLabels) -> tuple[Tensor, Tensor, Tensor]:
        x, y = piece
        log_likelihood = torch.addmm(b.to(x.dtype), x, w.to(x.dtype).T).log_softmax(dim=1)
        likelihood = log_likelihood.gather(1, y[:, None]).sum(dtype=torch.float64)
        residual = log_likelihood.exp_()
        residual[torch.arange(len(y), device=device), y] -= 1
        return likelihood, residual.T @ x, residual.sum(dim=0, dtype=torch.float64)

    pieces = split_rows_into_pieces(rows) if device.type == "cpu" else rows
    for likelihood, piece_weight_gradient, piece_bias_gradient in map_in_order(
        thread_pool, compute_sums, pieces
    ):
        loss -= likelihood
        bias_gradient += piece_bias_gradient
        weight_gradient += piece_weight_gradient
    return (
        loss.item() / sample_count,
        weight_gradient.cpu() / sample_count,
        bias_gradient.cpu() / sample_count,
    )


class PenalisedLoss:
    """Mean cross-entropy + l2/2 |W - P|^2 as a function of a point in preconditioned coordinates.

    In these coordinates the curvature at zero weights, ``variance / C + l2`` along the principal axes, is the
    identity; that more than halves the passes.

    Attributes
    ----------
    largest_gradient : float
        Largest entry of the gradient at the last point, times C.
    """

    def __init__(
        self,
        rows: Iterable[FeaturesAndLabels],
        sample_count: int,
        scaling: FeatureScaling,
        l2: float,
        prior_fit: LogisticFit | None,
        class_count: int,
        device: torch.device,
        report_pass_rows: PassRowsCallback,
    ) -> None:
        self.rows, self.sample_count, self.device, self.report_pass_rows = (
            rows,
            sample_count,
            device,
            report_pass_rows,
        )
        self.axes, self.l2, self.bias_l2 = scaling.principal_axes, l2, l2 if prior_fit else 0.0
        self.prior = prior_fit or make_zero_fit(class_count, len(scaling.mean))
        self.weight_scale = (scaling.axis_variances / class_count + l2).rsqrt()
        self.bias_scale = (1 / class_count + self.bias_l2) ** -0.5
        self.threads: ThreadPoolExecutor | None = None
        self.largest_gradient = float("inf")

    def convert_fit_to_point(self, fit: LogisticFit) -> npt.NDArray[np.float64]:
        """Return the point of a fit."""
        inner = ((fit.weight - self.prior.weight) @ self.axes) / self.weight_scale
        return torch.cat([inner.flatten(), (fit.bias - self.prior.bias) / self.bias_scale]).numpy()

    def convert_point_to_weight_and_bias(self, point: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Return weight and bias at a point."""
        classes = len(self.prior.bias)
        inner = torch.from_numpy(point[:-classes]).view(classes, len(self.weight_scale))
        weight = self.prior.weight + (inner * self.weight_scale) @ self.axes.T
        return weight, self.prior.bias + torch.from_numpy(point[-classes:]) * self.bias_scale

    def __call__(self, point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the loss and its gradient at a point, in one pass over the rows."""
        weight, bias = self.convert_point_to_weight_and_bias(point)
        loss, weight_gradient, bias_gradient = compute_loss_and_gradients(
            self.rows, self.sample_count, weight, bias, self.device, self.threads
        )
        self.report_pass_rows(self.sample_count)
        weight_change, bias_change = weight - self.prior.weight, bias - self.prior.bias
        weight_gradient += self.l2 * weight_change
        bias_gradient += self.bias_l2 * bias_change
        self.largest_gradient = len(bias) * max(
            weight_gradient.abs().max().item(), bias_gradient.abs().max().item()
        )
        inner = (weight_gradient @ self.axes) * self.weight_scale
        gradient: npt.NDArray[np.float64] = torch.cat(
            [inner.flatten(), bias_gradient * self.bias_scale]
        ).numpy()
        penalty = self.l2 * weight_change.square().sum().item()
        penalty += self.bias_l2 * bias_change.square().sum().item()
        return loss + penalty / 2, gradient


def fit_logistic(
    rows: Iterable[FeaturesAndLabels],
    sample_count: int,
    scaling: FeatureScaling,
    l2: float,
    start_fit: LogisticFit,
    device: torch.device,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
    report_pass_rows: PassRowsCallback = ignore_pass_rows,
    prior_fit: LogisticFit | None = None,
    max_iterations: int | None = None,
) -> LogisticFit:
    """Minimise mean cross-entropy + l2/2 |W - P|^2 on standardised features, with L-BFGS and full gradients.

    Every evaluation passes over all rows once; see :class:`PenalisedLoss`.

    Parameters
    ----------
    rows : iterable of (features, labels)
        Standardised; see ``standardise_rows``.
    sample_count : int
        Number of rows.
    scaling : FeatureScaling
    l2 : float
    start_fit : LogisticFit
        First point of the search; its weights are projected on the axes of the scaling.
    device : torch.device
        Device of the rows.
    gradient_tolerance : float
        Of the largest entry of the gradient, times C.
    report_pass_rows : callable, optional
    prior_fit : LogisticFit, optional
        Its weights are P, and its biases are penalised alike; else P is zero, and biases are free.
    max_iterations : int, optional
        Default: ``MAX_LBFGS_ITERATIONS``.
    """
    from scipy.optimize import minimize  # slow to import

    max_iterations = max_iterations or MAX_LBFGS_ITERATIONS
    loss = PenalisedLoss(
        rows, sample_count, scaling, l2, prior_fit, len(start_fit.bias), device, report_pass_rows
    )

    def stop_at_tolerance(_: npt.NDArray[np.float64]) -> None:
        if loss.largest_gradient <= gradient_tolerance:
            raise StopIteration

    with deterministic_thread_pool(device) as loss.threads:
        found = minimize(
            loss,
            loss.convert_fit_to_point(start_fit),
            jac=True,
            method="L-BFGS-B",
            callback=stop_at_tolerance,
            options={
                "maxcor": LBFGS_HISTORY,
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "ftol": 0,
                "gtol": 0,
            },
        )
        if loss.largest_gradient > gradient_tolerance:
            # The result may not be the last point that was evaluated.
            loss(found.x)
        return LogisticFit(
            *loss.convert_point_to_weight_and_bias(found.x),
            int(found.nit),
            loss.largest_gradient <= gradient_tolerance,
        )


def compute_cross_entropies(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]],
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Return the cross-entropy of a classifier of raw features on every sample."""
    losses = [np.zeros(0)]
    with find_blas_libraries().limit(limits=1), one_torch_thread():
        for features, labels in blocks:
            logits = torch.from_numpy(features @ weight.T + bias).double()
            losses.append(cross_entropy(logits, torch.from_numpy(labels).long(), reduction="none").numpy())
    return np.concatenate(losses)
