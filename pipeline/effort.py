"""What the statistics of an entry will take, and how far they are."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sfm.events import Progress, ProgressCallback
from sfm.pipeline import classifier
from sfm.pipeline.centres import MOST_ROWS
from sfm.pipeline.logistic import cross_entropy_and_gradient, workers_of
from sfm.pipeline.moments import moments_of
from sfm.stats_store.digests import BLOCK_ROWS

CHOOSING_PASSES = 65
"""Passes that choose a penalty take: some ten for each of six or seven penalties."""

FITTING_PASSES = 50
"""Passes that the final fit takes from there."""

EIGEN, MOVING, SORTING, ASSIGNING, PLACING = 6, 24, 100, 50, 250
"""Multiply-adds that decomposing takes per D^3; and per value of a feature, above what products do: a pass,
moments, assigning centres, and, per centre, placing them."""


@dataclass(frozen=True)
class Effort:
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


def operations_of_pass(rows: int, features: int, classes: int) -> float:
    """Return what a pass of the classifier over so many rows takes."""
    return float(rows) * features * (4 * classes + MOVING)


def operations_of_moments(rows: int, features: int) -> float:
    """Return what the moments of so many rows take, in double precision."""
    return float(rows) * features * (2 * features + SORTING)


def operations_of_centres(rows: int, features: int, k: int) -> float:
    """Return what placing K centres on so many rows takes, each by one core."""
    return float(rows) * features * k * PLACING


def estimate_effort(classes: int, features: int, samples: int, looks: int, numbers: Sequence[int]) -> Effort:
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
    scalings = 2 if samples <= classifier.FEW_ROWS else 1
    folds = 1
    if samples > 0:
        every = min(classifier.VALIDATION_EVERY, max(1, samples // classes))
        folds = -(-classifier.VALIDATING_ROWS * every // samples)
        folds = max(1, min(folds, every, classifier.MOST_FOLDS))
    most = max(classifier.CHOOSING_ROWS, looks * classes * classifier.CHOOSING_PER_CLASS)
    passes = CHOOSING_PASSES * scalings * folds
    placed = min(samples, classes * MOST_ROWS)
    return Effort(
        moments=operations_of_moments(samples, features) + scalings * EIGEN * float(features) ** 3,
        choosing=passes * operations_of_pass(min(rows, most), features, classes),
        fitting=FITTING_PASSES * operations_of_pass(rows, features, classes),
        centres=sum(operations_of_centres(placed, features, k) for k in numbers)
        + samples * float(features) * sum(8 * k + ASSIGNING for k in numbers),
    )


def measure_operations(classes: int, features: int, device: torch.device) -> float:
    """Return how many of these operations a second this machine does, tried on made-up features."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BLOCK_ROWS // 4, features), dtype=np.float32)
    labels = np.arange(len(rows), dtype=np.int32) % classes
    block = torch.from_numpy(rows).to(device), torch.from_numpy(labels).long().to(device)
    weight, bias = torch.zeros(classes, features), torch.zeros(classes)
    done, seconds = 0.0, 0.0
    for attempt in range(3):
        began = time.perf_counter()
        moments_of(rows, labels, classes)
        with workers_of(device) as workers:
            cross_entropy_and_gradient([block] * 8, 8 * len(rows), weight, bias, device, workers)
        if attempt:  # What is done for the first time takes longer.
            seconds += time.perf_counter() - began
            done += operations_of_moments(len(rows), features)
            done += operations_of_pass(8 * len(rows), features, classes)
    return done / seconds


@dataclass
class Meter:
    """Tells how much of an effort is behind, in percent; a phase that takes longer waits at its end.

    Attributes
    ----------
    progress : callable
    stage : str
    effort : Effort
    """

    progress: ProgressCallback
    stage: str
    effort: Effort
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


Block = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]


def watch_blocks(blocks: Iterable[Block], meter: Meter, features: int, end: float) -> Iterator[Block]:
    """Yield blocks, and count the moments of each as done when the next is asked for."""
    for rows, labels in blocks:
        yield rows, labels
        meter.advance(operations_of_moments(len(labels), features), end)
