"""Sub-class centres: k-means within each class."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from sfm.pipeline.runtime import count_cores
from sfm.pipeline.staged_features import StagedFeatures
from sfm.random_streams import make_rng

MAX_ROWS_PER_CLASS = 2048
"""Samples per class that place the centres; then all samples of the class define them."""

MAX_CLUSTERING_BYTES = 2**30
"""Samples in memory while centres are placed; every group of classes is one pass over the features."""

PlacedCentresCallback = Callable[[int, int], None]
"""Called for every class and K with the number of samples that placed the centres, and K."""


class SubClassCentres(NamedTuple):
    """K centres of every class, the one with the most samples first.

    Attributes
    ----------
    centres : ndarray of float32, shape (C, K, D)
        NaN where a class has too few samples.
    sample_counts : ndarray of int64, shape (C, K)
    """

    centres: npt.NDArray[np.float32]
    sample_counts: npt.NDArray[np.int64]


def ignore_placed_centres(_samples: int, _k: int) -> None:
    """Do nothing."""


def compute_sub_class_centres(
    train: StagedFeatures,
    labels: npt.NDArray[np.int32],
    class_count: int,
    feature_count: int,
    sub_class_k_values: Sequence[int],
    seed: int,
    report_placed_centres: PlacedCentresCallback = ignore_placed_centres,
) -> dict[int, SubClassCentres]:
    """Compute the sub-class centres of every class, for each K.

    k-means++ and Lloyd's iterations on at most ``MAX_ROWS_PER_CLASS`` random samples of a class place the
    centres, and move a centre that loses all its samples to the sample farthest from its own; then every
    sample is assigned to its nearest centre, block by block, and centres become the means of their samples.
    Memory holds at most ``MAX_CLUSTERING_BYTES`` of samples, and the centres.

    Parameters
    ----------
    train : StagedFeatures
    labels : ndarray of int32, shape (n,)
        Labels of all rows of `train`.
    sub_class_k_values : sequence of int
        Values of K.
    report_placed_centres : callable, optional
        Called when centres of a class are placed.

    Returns
    -------
    dict of int to SubClassCentres
        By K. Surplus centres of small classes are NaN with count 0.
    """
    if not sub_class_k_values:
        return {}
    centres_by_k = place_centres_on_sampled_rows(
        train, labels, class_count, feature_count, sub_class_k_values, seed, report_placed_centres
    )
    sums = {k: np.zeros((class_count, k, feature_count)) for k in sub_class_k_values}
    counts = {k: np.zeros((class_count, k), dtype=np.int64) for k in sub_class_k_values}
    # A single thread, because sums depend on the number of threads.
    with threadpool_limits(limits=1, user_api="blas"):
        for rows, block_labels in train:
            for c in np.unique(block_labels):
                own = rows[block_labels == c].astype(np.float64)
                for k in sub_class_k_values:
                    nearest = find_nearest_centres(own, centres_by_k[k][c])
                    sums[k][c] += (nearest == np.arange(k)[:, None]).astype(np.float64) @ own
                    counts[k][c] += np.bincount(nearest, minlength=k)
    result = {}
    for k in sub_class_k_values:
        order = np.argsort(-counts[k], axis=1, kind="stable")
        count = np.take_along_axis(counts[k], order, axis=1)
        total = np.take_along_axis(sums[k], order[:, :, None], axis=1)
        centre = np.full(total.shape, np.nan)
        np.divide(total, count[:, :, None], out=centre, where=count[:, :, None] > 0)
        result[k] = SubClassCentres(centre.astype(np.float32), count)
    return result


def find_nearest_centres(
    rows: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]
) -> npt.NDArray[np.intp]:
    """Return the index of the centre nearest to each row; centres that are NaN are never nearest."""
    distance = np.square(centres).sum(axis=1) - 2 * rows @ centres.T
    nearest: npt.NDArray[np.intp] = np.argmin(np.where(np.isnan(distance), np.inf, distance), axis=1)
    return nearest


def place_centres_on_sampled_rows(
    train: StagedFeatures,
    labels: npt.NDArray[np.int32],
    class_count: int,
    feature_count: int,
    sub_class_k_values: Sequence[int],
    seed: int,
    report_placed_centres: PlacedCentresCallback = ignore_placed_centres,
) -> dict[int, npt.NDArray[np.float64]]:
    """Place K centres per class by k-means on a bounded sample; NaN where a class has too few samples.

    Classes and values of K are distributed over cores.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import

    centres_by_k = {k: np.full((class_count, k, feature_count), np.nan) for k in sub_class_k_values}
    class_sizes = np.minimum(np.bincount(labels, minlength=class_count), MAX_ROWS_PER_CLASS)
    with pool_of_single_threaded_threads() as pool, warnings.catch_warnings():
        # Fewer distinct rows than centres: the empty ones end up with count 0, which says the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for members in group_consecutive_classes(
            class_sizes, max(1, MAX_CLUSTERING_BYTES // (4 * feature_count))
        ):
            is_sampled = np.zeros(len(labels), dtype=bool)
            for c in members:
                own = np.flatnonzero(labels == c)
                is_sampled[make_rng(seed, 1, c).permutation(own)[:MAX_ROWS_PER_CLASS]] = True
            rows_by_class: dict[int, list[npt.NDArray[np.float32]]] = {c: [] for c in members}
            for rows, block_labels in train.select_rows(is_sampled):
                for c in np.unique(block_labels):
                    rows_by_class[int(c)].append(rows[block_labels == c])
            samples = [(np.concatenate(rows_by_class.pop(c)), c) for c in members]
            jobs = [(sample, k, c) for sample, c in samples for k in sub_class_k_values]
            results = pool.map(lambda job: run_k_means(job[0], job[1], seed, job[2]), jobs)
            for (sample, k, c), centres in zip(jobs, results, strict=True):
                centres_by_k[k][c, : len(centres)] = centres
                report_placed_centres(len(sample), k)
    return centres_by_k


@contextmanager
def pool_of_single_threaded_threads() -> Iterator[ThreadPoolExecutor]:
    """Start a thread per core in use, each single-threaded: parallel sums differ from run to run."""

    def limit_openmp() -> None:
        # OpenMP has a separate limit for every thread.
        threadpool_limits(limits=1, user_api="openmp")

    threads = min(count_cores(), torch.get_num_threads())  # as many as --threads allows
    with threadpool_limits(limits=1), ThreadPoolExecutor(threads, initializer=limit_openmp) as pool:
        yield pool


def group_consecutive_classes(class_sizes: npt.NDArray[np.int64], max_group_samples: int) -> list[range]:
    """Split consecutive classes into groups of a maximum number of samples, or of one class."""
    groups, start, total = [], 0, 0
    for c, size in enumerate(class_sizes.tolist()):
        if c > start and total + size > max_group_samples:
            groups.append(range(start, c))
            start, total = c, 0
        total += size
    return [*groups, range(start, len(class_sizes))]


def run_k_means(
    rows: npt.NDArray[np.float32], centre_count: int, seed: int, class_index: int
) -> npt.NDArray[np.float64]:
    """Return the k centres of rows, or as many as there are rows."""
    from sklearn.cluster import KMeans  # slow to import

    state = int(make_rng(seed, 2, class_index).integers(2**31))
    model = KMeans(min(centre_count, len(rows)), n_init=1, random_state=state, algorithm="lloyd").fit(
        rows.astype(np.float64)
    )
    centres: npt.NDArray[np.float64] = model.cluster_centers_
    return centres
