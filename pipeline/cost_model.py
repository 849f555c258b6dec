"""What the statistics of an entry will take, and how far they are."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sfm.events import Progress, ProgressCallback
from sfm.pipeline import linear_classifier
from sfm.pipeline.block_moments import compute_moments
from sfm.pipeline.logistic import compute_loss_and_gradient, deterministic_threads
from sfm.pipeline.sub_class_centres import MAX_ROWS_PER_CLASS
from sfm.stats_store.digest import BLOCK_ROWS

SELECTION_PASSES = 65
"""Passes that choose a penalty take: some ten for each of six or seven penalties."""

FITTING_PASSES = 50
"""Passes that the final fit takes from there."""

EIGEN_COST, PASS_COST, MOMENTS_COST, ASSIGN_COST, PLACE_COST = 6, 24, 100, 50, 250
"""Multiply-adds that decomposing takes per D^3; and per value of a feature, above what products do: a pass,
moments, assigning centres, and, per centre, placing them."""


@dataclass(frozen=True)
class StatisticsCost:
    """What the statistics of one entry are expected to take, in arithmetic operations.

    Attributes
    ----------
    moments, choosing, fitting, centres : float
        Of the moments and their decomposition, of choosing the penalty, of the final fit, and of the
        sub-class centres.
    """

    moments: float
    choosing: float
    fitting: float
    centres: float

    @property
    def classifier(self) -> float:
        """Of the moments and the classifier."""
        return self.moments + self.choosing + self.fitting

    @property
    def total(self) -> float:
        """All of it."""
        return self.classifier + self.centres


def count_pass_operations(rows: int, features: int, classes: int) -> float:
    """Return what a pass of the classifier over so many rows takes."""
    return float(rows) * features * (4 * classes + PASS_COST)


def count_moments_operations(rows: int, features: int) -> float:
    """Return what the moments of so many rows take, in double precision."""
    return float(rows) * features * (2 * features + MOMENTS_COST)


def count_centres_operations(rows: int, features: int, k: int) -> float:
    """Return what placing K centres on so many rows takes, each by one core."""
    return float(rows) * features * k * PLACE_COST


def estimate_statistics_cost(
    classes: int, features: int, samples: int, looks: int, numbers: Sequence[int]
) -> StatisticsCost:
    """Estimate what the statistics of an entry take.

    Parameters
    ----------
    classes, features : int
    samples : int
        Training samples of the entry.
    looks : int
        Images and views of each.
    numbers : sequence of int
        The K of the sub-class centres.
    """
    rows = looks * samples
    scalings = 2 if samples <= linear_classifier.MAX_SMALL_DATASET_ROWS else 1
    folds = 1
    if samples > 0:
        every = min(linear_classifier.VALIDATION_FOLDS, max(1, samples // classes))
        folds = -(-linear_classifier.MIN_VALIDATION_ROWS * every // samples)
        folds = max(1, min(folds, every, linear_classifier.MAX_FOLDS))
    most = max(
        linear_classifier.MAX_SELECTION_ROWS, looks * classes * linear_classifier.MIN_SELECTION_ROWS_PER_CLASS
    )
    passes = SELECTION_PASSES * scalings * folds
    placed = min(samples, classes * MAX_ROWS_PER_CLASS)
    return StatisticsCost(
        moments=count_moments_operations(samples, features) + scalings * EIGEN_COST * float(features) ** 3,
        choosing=passes * count_pass_operations(min(rows, most), features, classes),
        fitting=FITTING_PASSES * count_pass_operations(rows, features, classes),
        centres=sum(count_centres_operations(placed, features, k) for k in numbers)
        + samples * float(features) * sum(8 * k + ASSIGN_COST for k in numbers),
    )


def measure_operations_per_second(classes: int, features: int, device: torch.device) -> float:
    """Return how many of these operations a second this machine does, tried on made-up features."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BLOCK_ROWS // 4, features), dtype=np.float32)
    labels = np.arange(len(rows), dtype=np.int32) % classes
    block = torch.from_numpy(rows).to(device), torch.from_numpy(labels).long().to(device)
    weight, bias = torch.zeros(classes, features), torch.zeros(classes)
    done, seconds = 0.0, 0.0
    for attempt in range(3):
        began = time.perf_counter()
        compute_moments(rows, labels, classes)
        with deterministic_threads(device) as workers:
            compute_loss_and_gradient([block] * 8, 8 * len(rows), weight, bias, device, workers)
        if attempt:  # What is done for the first time takes longer.
            seconds += time.perf_counter() - began
            done += count_moments_operations(len(rows), features)
            done += count_pass_operations(8 * len(rows), features, classes)
    return done / seconds


@dataclass
class StatisticsProgress:
    """Tells how much of an effort is behind, in percent; a phase that takes longer waits at its end.

    Attributes
    ----------
    progress : callable
    stage : str
    effort : Effort
    """

    progress: ProgressCallback
    stage: str
    effort: StatisticsCost
    _done: float = 0.0
    _told: int = field(default=-1)

    def advance(self, operations: float, end: float) -> None:
        """Count operations as done, up to the end of the phase that they are of."""
        self._done = max(self._done, min(self._done + operations, end))
        self.tell()

    def reach(self, end: float) -> None:
        """Count all as done up to the end of a phase."""
        self._done = max(self._done, end)
        self.tell()

    def finish(self, **figures: float) -> None:
        """Count all as done, and tell figures."""
        self._done, self._told = self.effort.total, -1
        self.tell(**figures)

    def tell(self, **figures: float) -> None:
        """Tell the percentage, where it has changed or there are figures to show."""
        percent = min(100, int(100 * self._done / self.effort.total))
        if percent != self._told or figures:
            self._told = percent
            self.progress(Progress(self.stage, percent, 100, "%", figures))


FeatureBlock = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]


def report_blocks(
    blocks: Iterable[FeatureBlock], meter: StatisticsProgress, features: int, end: float
) -> Iterator[FeatureBlock]:
    """Yield blocks, and count the moments of each as done when the next is asked for."""
    for rows, labels in blocks:
        yield rows, labels
        meter.advance(count_moments_operations(len(labels), features), end)
