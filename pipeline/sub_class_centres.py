"""Sub-class centres: k-means within each class."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from sfm.pipeline.runtime import count_cores
from sfm.pipeline.staging import StagedFeatures
from sfm.random_streams import make_rng

MAX_ROWS_PER_CLASS = 2048
"""Samples per class that place the centres; all samples then define them."""

MAX_GROUP_BYTES = 2**30
"""Samples held at a time to place centres; every group of classes is one pass over the features."""

CentresCallback = Callable[[int, int], None]
"""Told on how many samples of a class centres were placed, and how many centres."""


def ignore_centres(_samples: int, _k: int) -> None:
    """Do nothing."""


def compute_sub_class_centres(
    train: StagedFeatures,
    labels: npt.NDArray[np.int32],
    classes: int,
    features: int,
    numbers: Sequence[int],
    seed: int,
    on_placed: CentresCallback = ignore_centres,
) -> dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Cluster every class into K sub-classes, for each K asked for.

    k-means++ and Lloyd's iterations on at most ``MAX_ROWS_PER_CLASS`` random samples of a class place the
    centres, and move a centre that loses all its samples to the sample farthest from its own; then every
    sample is assigned to its nearest centre, block by block, and centres become the means of their samples.
    Memory holds ``MAX_GROUP_BYTES`` of samples and the centres, whatever the number of samples.

    Parameters
    ----------
    train : Staged
    labels : ndarray of int32, shape (n,)
        Labels of all rows of `train`.
    numbers : sequence of int
        The K.
    on_placed : callable, optional
        Told of every K of every class whose centres are placed: on how many samples, and the K.

    Returns
    -------
    dict of int to (centre, count)
        Per K: float32 (C, K, D) and int64 (C, K), largest first. Rows that a small class cannot fill are NaN
        with count 0.
    """
    if not numbers:
        return {}
    placed = place_centres(train, labels, classes, features, numbers, seed, on_placed)
    sums = {k: np.zeros((classes, k, features)) for k in numbers}
    counts = {k: np.zeros((classes, k), dtype=np.int64) for k in numbers}
    # One thread, since how many there are would shape the sums.
    with threadpool_limits(limits=1, user_api="blas"):
        for rows, block_labels in train:
            for c in np.unique(block_labels):
                own = rows[block_labels == c].astype(np.float64)
                for k in numbers:
                    nearest = find_nearest_centres(own, placed[k][c])
                    sums[k][c] += (nearest == np.arange(k)[:, None]).astype(np.float64) @ own
                    counts[k][c] += np.bincount(nearest, minlength=k)
    result = {}
    for k in numbers:
        order = np.argsort(-counts[k], axis=1, kind="stable")
        count = np.take_along_axis(counts[k], order, axis=1)
        total = np.take_along_axis(sums[k], order[:, :, None], axis=1)
        centre = np.full(total.shape, np.nan)
        np.divide(total, count[:, :, None], out=centre, where=count[:, :, None] > 0)
        result[k] = (centre.astype(np.float32), count)
    return result


def find_nearest_centres(
    rows: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]
) -> npt.NDArray[np.intp]:
    """Return the index of the centre nearest to each row; centres that are NaN are never nearest."""
    distance = np.square(centres).sum(axis=1) - 2 * rows @ centres.T
    nearest: npt.NDArray[np.intp] = np.argmin(np.where(np.isnan(distance), np.inf, distance), axis=1)
    return nearest


def place_centres(
    train: StagedFeatures,
    labels: npt.NDArray[np.int32],
    classes: int,
    features: int,
    numbers: Sequence[int],
    seed: int,
    on_placed: CentresCallback = ignore_centres,
) -> dict[int, npt.NDArray[np.float64]]:
    """Place K centres per class by k-means on a bounded sample; NaN where a class has too few samples.

    Every core takes a class and a K at a time.
    """
    placed = {k: np.full((classes, k, features), np.nan) for k in numbers}
    held = np.minimum(np.bincount(labels, minlength=classes), MAX_ROWS_PER_CLASS)
    with single_threaded_pool() as pool, warnings.catch_warnings():
        # Fewer distinct rows than centres: the empty ones end up with count 0, which says the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for members in group_classes(held, max(1, MAX_GROUP_BYTES // (4 * features))):
            chosen = np.zeros(len(labels), dtype=bool)
            for c in members:
                own = np.flatnonzero(labels == c)
                chosen[make_rng(seed, 1, c).permutation(own)[:MAX_ROWS_PER_CLASS]] = True
            kept: dict[int, list[npt.NDArray[np.float32]]] = {c: [] for c in members}
            for rows, block_labels in train.only(chosen):
                for c in np.unique(block_labels):
                    kept[int(c)].append(rows[block_labels == c])
            samples = [(np.concatenate(kept.pop(c)), c) for c in members]
            work = [(sample, k, c) for sample, c in samples for k in numbers]
            found = pool.map(lambda each: run_k_means(each[0], each[1], seed, each[2]), work)
            for (sample, k, c), centres in zip(work, found, strict=True):
                placed[k][c, : len(centres)] = centres
                on_placed(len(sample), k)
    return placed


@contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """Provide a thread for every core in use. Each computes alone: parallel sums differ from run to run."""

    def limit_openmp() -> None:
        # OpenMP keeps its limit for every thread by itself.
        threadpool_limits(limits=1, user_api="openmp")

    threads = min(count_cores(), torch.get_num_threads())  # as many as --threads allows
    with threadpool_limits(limits=1), ThreadPoolExecutor(threads, initializer=limit_openmp) as pool:
        yield pool


def group_classes(sizes: npt.NDArray[np.int64], most: int) -> list[range]:
    """Cut consecutive classes into groups of at most so many samples, or of one class."""
    groups, start, total = [], 0, 0
    for c, size in enumerate(sizes.tolist()):
        if c > start and total + size > most:
            groups.append(range(start, c))
            start, total = c, 0
        total += size
    return [*groups, range(start, len(sizes))]


def run_k_means(rows: npt.NDArray[np.float32], k: int, seed: int, c: int) -> npt.NDArray[np.float64]:
    """Return the k centres of rows, or as many as there are rows."""
    state = int(make_rng(seed, 2, c).integers(2**31))
    model = KMeans(min(k, len(rows)), n_init=1, random_state=state, algorithm="lloyd").fit(
        rows.astype(np.float64)
    )
    centres: npt.NDArray[np.float64] = model.cluster_centers_
    return centres
