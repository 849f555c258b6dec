"""Cost of an entry's statistics: estimated in arithmetic operations, and reported as progress."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sfm.events import Progress, ProgressCallback
from sfm.pipeline import linear_classifier
from sfm.pipeline.block_moments import compute_moments
from sfm.pipeline.logistic import compute_loss_and_gradient, deterministic_threads
from sfm.pipeline.sub_class_centres import MAX_ROWS_PER_CLASS
from sfm.stats_store.digests import BLOCK_ROWS

SELECTION_PASSES = 65
"""Passes that choose a penalty: about ten for each of six or seven penalties."""

FITTING_PASSES = 50
"""Passes of the final fit."""

EIGEN_COST, PASS_COST, MOMENTS_COST, ASSIGN_COST, PLACE_COST = 6, 24, 100, 50, 250
"""Multiply-adds of an eigendecomposition per D^3; and per feature value, besides matrix products, of a pass,
of moments, of assigning samples to centres, and, per centre, of placing centres."""


@dataclass(frozen=True)
class StatisticsCost:
    """Expected cost of one entry's statistics, in arithmetic operations.

    Attributes
    ----------
    moments, selection, fitting, centres : float
        Of the moments and their decomposition, of choosing the penalty, of the final fit, and of the
        sub-class centres.
    """

    moments: float
    selection: float
    fitting: float
    centres: float

    @property
    def classifier(self) -> float:
        """Operations up to the end of the classifier: moments, selection and fitting."""
        return self.moments + self.selection + self.fitting

    @property
    def total(self) -> float:
        """All operations."""
        return self.classifier + self.centres


def count_pass_operations(rows: int, features: int, classes: int) -> float:
    """Return the operations of a pass of the classifier over a number of rows."""
    return float(rows) * features * (4 * classes + PASS_COST)


def count_moments_operations(rows: int, features: int) -> float:
    """Return the operations of the moments of a number of rows, in double precision."""
    return float(rows) * features * (2 * features + MOMENTS_COST)


def count_centres_operations(rows: int, features: int, k: int) -> float:
    """Return the operations of placing K centres on a number of rows, on one core."""
    return float(rows) * features * k * PLACE_COST


def estimate_statistics_cost(
    classes: int, features: int, samples: int, images_per_sample: int, sub_class_counts: Sequence[int]
) -> StatisticsCost:
    """Estimate the cost of an entry's statistics.

    Parameters
    ----------
    classes, features : int
    samples : int
        Training samples of the entry.
    images_per_sample : int
        One plus the number of views.
    sub_class_counts : sequence of int
        Numbers of sub-class centres, K.
    """
    rows = images_per_sample * samples
    scalings = 2 if samples <= linear_classifier.MAX_SMALL_DATASET_ROWS else 1
    folds = 1
    if samples > 0:
        max_folds = min(linear_classifier.VALIDATION_FOLDS, max(1, samples // classes))
        folds = -(-linear_classifier.MIN_VALIDATION_ROWS * max_folds // samples)
        folds = max(1, min(folds, max_folds, linear_classifier.MAX_FOLDS))
    max_rows = max(
        linear_classifier.MAX_SELECTION_ROWS,
        images_per_sample * classes * linear_classifier.MIN_SELECTION_ROWS_PER_CLASS,
    )
    passes = SELECTION_PASSES * scalings * folds
    clustered = min(samples, classes * MAX_ROWS_PER_CLASS)
    return StatisticsCost(
        moments=count_moments_operations(samples, features) + scalings * EIGEN_COST * float(features) ** 3,
        selection=passes * count_pass_operations(min(rows, max_rows), features, classes),
        fitting=FITTING_PASSES * count_pass_operations(rows, features, classes),
        centres=sum(count_centres_operations(clustered, features, k) for k in sub_class_counts)
        + samples * float(features) * sum(8 * k + ASSIGN_COST for k in sub_class_counts),
    )


def measure_operations_per_second(classes: int, features: int, device: torch.device) -> float:
    """Return the operations per second of this machine, measured on random features."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BLOCK_ROWS // 4, features), dtype=np.float32)
    labels = np.arange(len(rows), dtype=np.int32) % classes
    block = torch.from_numpy(rows).to(device), torch.from_numpy(labels).long().to(device)
    weight, bias = torch.zeros(classes, features), torch.zeros(classes)
    operations, seconds = 0.0, 0.0
    for attempt in range(3):
        began = time.perf_counter()
        compute_moments(rows, labels, classes)
        with deterministic_threads(device) as threads:
            compute_loss_and_gradient([block] * 8, 8 * len(rows), weight, bias, device, threads)
        if attempt:  # The first attempt takes longer.
            seconds += time.perf_counter() - began
            operations += count_moments_operations(len(rows), features)
            operations += count_pass_operations(8 * len(rows), features, classes)
    return operations / seconds


@dataclass
class StatisticsProgress:
    """Reports the finished share of a cost in percent; a phase that takes longer stays at its end.

    Attributes
    ----------
    progress : callable
    stage : str
    cost : StatisticsCost
    """

    progress: ProgressCallback
    stage: str
    cost: StatisticsCost
    _done: float = 0.0
    _reported_percent: int = -1

    def advance(self, operations: float, phase_end: float) -> None:
        """Add operations, at most up to the end of their phase, and report."""
        self._done = max(self._done, min(self._done + operations, phase_end))
        self.report()

    def advance_to(self, phase_end: float) -> None:
        """Advance to the end of a phase, and report."""
        self._done = max(self._done, phase_end)
        self.report()

    def finish(self, **figures: float) -> None:
        """Advance to the end, and report figures."""
        self._done, self._reported_percent = self.cost.total, -1
        self.report(**figures)

    def report(self, **figures: float) -> None:
        """Report the percentage if it has changed, or if there are figures to show."""
        percent = min(100, int(100 * self._done / self.cost.total))
        if percent != self._reported_percent or figures:
            self._reported_percent = percent
            self.progress(Progress(self.stage, percent, 100, "%", figures))


FeatureBlock = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]


def report_block_progress(
    blocks: Iterable[FeatureBlock], meter: StatisticsProgress, features: int, phase_end: float
) -> Iterator[FeatureBlock]:
    """Yield blocks, and report the moments of each as done when the next one is requested."""
    for rows, labels in blocks:
        yield rows, labels
        meter.advance(count_moments_operations(len(labels), features), phase_end)
