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
from sfm.pipeline.extract_config import ADAM_EPOCHS, ClassifierSolver
from sfm.pipeline.logistic import compute_loss_and_gradients, deterministic_thread_pool
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
class StatisticsOperations:
    """Expected cost of one entry's statistics, in arithmetic operations.

    Attributes
    ----------
    moments, penalty_selection, final_fit, sub_class_centres : float
        Of the moments and their decomposition, of choosing the penalty, of the final fit, and of the
        sub-class centres.
    """

    moments: float
    penalty_selection: float
    final_fit: float
    sub_class_centres: float

    @property
    def until_classifier_end(self) -> float:
        """Operations up to the end of the classifier: moments, selection and fitting."""
        return self.moments + self.penalty_selection + self.final_fit

    @property
    def total(self) -> float:
        """All operations."""
        return self.until_classifier_end + self.sub_class_centres


def count_classifier_pass_operations(row_count: int, feature_count: int, class_count: int) -> float:
    """Return the operations of a pass of the classifier over a number of rows."""
    return float(row_count) * feature_count * (4 * class_count + PASS_COST)


def count_moments_operations(row_count: int, feature_count: int) -> float:
    """Return the operations of the moments of a number of rows, in double precision."""
    return float(row_count) * feature_count * (2 * feature_count + MOMENTS_COST)


def count_centre_placing_operations(row_count: int, feature_count: int, centre_count: int) -> float:
    """Return the operations of placing K centres on a number of rows, on one core."""
    return float(row_count) * feature_count * centre_count * PLACE_COST


def estimate_statistics_operations(
    class_count: int,
    feature_count: int,
    training_sample_count: int,
    images_per_sample: int,
    sub_class_k_values: Sequence[int],
    classifier_solver: ClassifierSolver = "lbfgs",
) -> StatisticsOperations:
    """Estimate the cost of an entry's statistics.

    Parameters
    ----------
    class_count, feature_count : int
    training_sample_count : int
        Training samples of the entry.
    images_per_sample : int
        One plus the number of views.
    sub_class_k_values : sequence of int
        Numbers of sub-class centres, K.
    classifier_solver : ClassifierSolver
    """
    rows = images_per_sample * training_sample_count
    scalings = 2 if training_sample_count <= linear_classifier.MAX_SMALL_DATASET_ROWS else 1
    folds = 1
    if training_sample_count > 0:
        max_folds = min(linear_classifier.VALIDATION_FOLDS, max(1, training_sample_count // class_count))
        folds = -(-linear_classifier.MIN_VALIDATION_ROWS * max_folds // training_sample_count)
        folds = max(1, min(folds, max_folds, linear_classifier.MAX_FOLDS))
    max_rows = max(
        linear_classifier.MAX_SELECTION_ROWS,
        images_per_sample * class_count * linear_classifier.MIN_SELECTION_ROWS_PER_CLASS,
    )
    passes = SELECTION_PASSES * scalings * folds
    clustered = min(training_sample_count, class_count * MAX_ROWS_PER_CLASS)
    moments = count_moments_operations(training_sample_count, feature_count)
    selection = passes * count_classifier_pass_operations(min(rows, max_rows), feature_count, class_count)
    fit = FITTING_PASSES * count_classifier_pass_operations(rows, feature_count, class_count)
    if classifier_solver == "adam":
        one_view = count_classifier_pass_operations(training_sample_count, feature_count, class_count)
        selection, fit = 0.0, ADAM_EPOCHS * one_view
    else:
        moments += scalings * EIGEN_COST * float(feature_count) ** 3
    return StatisticsOperations(
        moments=moments,
        penalty_selection=selection,
        final_fit=fit,
        sub_class_centres=sum(
            count_centre_placing_operations(clustered, feature_count, k) for k in sub_class_k_values
        )
        + training_sample_count * float(feature_count) * sum(8 * k + ASSIGN_COST for k in sub_class_k_values),
    )


def measure_statistics_operations_per_second(
    class_count: int, feature_count: int, device: torch.device
) -> float:
    """Return the operations per second of this machine, measured on random features."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BLOCK_ROWS // 4, feature_count), dtype=np.float32)
    labels = np.arange(len(rows), dtype=np.int32) % class_count
    block = torch.from_numpy(rows).to(device), torch.from_numpy(labels).long().to(device)
    weight, bias = torch.zeros(class_count, feature_count), torch.zeros(class_count)
    operations, seconds = 0.0, 0.0
    for attempt in range(3):
        began = time.perf_counter()
        compute_moments(rows, labels, class_count)
        with deterministic_thread_pool(device) as threads:
            compute_loss_and_gradients([block] * 8, 8 * len(rows), weight, bias, device, threads)
        if attempt:  # The first attempt takes longer.
            seconds += time.perf_counter() - began
            operations += count_moments_operations(len(rows), feature_count)
            operations += count_classifier_pass_operations(8 * len(rows), feature_count, class_count)
    return operations / seconds


@dataclass
class StatisticsProgress:
    """Reports the finished share of a cost in percent; a phase that takes longer stays at its end.

    Attributes
    ----------
    progress : callable
    stage : str
    cost : StatisticsOperations
    """

    progress: ProgressCallback
    stage: str
    cost: StatisticsOperations
    _done: float = 0.0
    _reported_percent: int = -1

    def advance_within_phase(self, operations: float, phase_end_operations: float) -> None:
        """Add operations, at most up to the end of their phase, and report."""
        self._done = max(self._done, min(self._done + operations, phase_end_operations))
        self.report_if_changed()

    def advance_to_phase_end(self, phase_end_operations: float) -> None:
        """Advance to the end of a phase, and report."""
        self._done = max(self._done, phase_end_operations)
        self.report_if_changed()

    def finish(self, **figures: float) -> None:
        """Advance to the end, and report figures."""
        self._done, self._reported_percent = self.cost.total, -1
        self.report_if_changed(**figures)

    def report_if_changed(self, **figures: float) -> None:
        """Report the percentage if it has changed, or if there are figures to show."""
        percent = min(100, int(100 * self._done / self.cost.total))
        if percent != self._reported_percent or figures:
            self._reported_percent = percent
            self.progress(Progress(self.stage, percent, 100, "%", figures))


FeatureBlock = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]


def iterate_with_moments_progress(
    blocks: Iterable[FeatureBlock], meter: StatisticsProgress, feature_count: int, phase_end_operations: float
) -> Iterator[FeatureBlock]:
    """Yield blocks, and report the moments of each as done when the next one is requested."""
    for rows, labels in blocks:
        yield rows, labels
        meter.advance_within_phase(count_moments_operations(len(labels), feature_count), phase_end_operations)
