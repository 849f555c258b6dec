"""The moments and the sub-class centres of a union of datasets, from those of its inputs."""

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sfm.errors import DamageError
from sfm.stats_store.array_values import find_scatter_sum_problem
from sfm.stats_store.class_moments import (
    ClassMoments,
    expand_moments_to_class_union,
    make_empty_moments,
    merge_moments,
)
from sfm.stats_store.merge_inputs import MOMENT_ARRAYS, MergeInputs


class MergedSubClassCentres(NamedTuple):
    """Centres of K sub-classes of every class, and their samples, largest first.

    Attributes
    ----------
    centres : ndarray of float32, shape (C, K, D)
        NaN where a class has fewer sub-classes.
    sample_counts : ndarray of int64, shape (C, K)
        Zero there.
    """

    centres: npt.NDArray[np.float32]
    sample_counts: npt.NDArray[np.int64]


def compute_merged_moments(inputs: MergeInputs) -> ClassMoments:
    """Return the moments of the pooled data of all inputs."""
    total = make_empty_moments(len(inputs.class_ids), inputs.entries[0].backbone.features)
    for entry, positions in zip(inputs.entries, inputs.class_positions_in_union, strict=True):
        entry_moments = ClassMoments(*(entry.read_array(name) for name in MOMENT_ARRAYS))
        diagonal = np.diagonal(entry_moments.within_scatter)
        if problem := find_scatter_sum_problem(diagonal, entry_moments.scatter_diagonal):
            raise DamageError(f"damaged array runs/{entry.commit.run}/train/within_scatter: {problem}")
        total = merge_moments(
            total, expand_moments_to_class_union(entry_moments, positions, len(inputs.class_ids))
        )
    return total


def compute_merged_centres(inputs: MergeInputs, centres_per_class: int) -> MergedSubClassCentres:
    """Cluster the sub-class centres of all inputs, each weighted by the number of its samples.

    A class that only one input has keeps its centres.
    """
    classes, features = len(inputs.class_ids), inputs.entries[0].backbone.features
    centre = np.full((classes, centres_per_class, features), np.nan, dtype=np.float32)
    count = np.zeros((classes, centres_per_class), dtype=np.int64)
    stored_centres = [
        (
            entry.read_array(f"train/centre_{centres_per_class}"),
            entry.read_array(f"train/centre_count_{centres_per_class}"),
        )
        for entry in inputs.entries
    ]
    indices_by_class = [
        {int(c): i for i, c in enumerate(positions)} for positions in inputs.class_positions_in_union
    ]
    for c in range(classes):
        class_centres = [
            (centres[index_by_class[c]], counts[index_by_class[c]])
            for (centres, counts), index_by_class in zip(stored_centres, indices_by_class, strict=True)
            if c in index_by_class
        ]
        points = np.concatenate([centres[n > 0] for centres, n in class_centres]).astype(np.float64)
        weights = np.concatenate([n[n > 0] for _, n in class_centres])
        cluster_centres, sizes = compute_cluster_centres_and_weights(points, weights, centres_per_class)
        centre[c, : len(cluster_centres)], count[c, : len(cluster_centres)] = cluster_centres, sizes
    return MergedSubClassCentres(centre, count)


def compute_cluster_centres_and_weights(
    points: npt.NDArray[np.float64], weights: npt.NDArray[np.int64], max_cluster_count: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return at most k centres of weighted points and the weight of each, heaviest first.

    Up to k points are their own centres.
    """
    cluster = np.arange(len(points))
    if len(points) > max_cluster_count:
        from sklearn.cluster import KMeans  # slow to import
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            # Coinciding points leave clusters empty, which are dropped below.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = KMeans(max_cluster_count, n_init=4, random_state=0, algorithm="lloyd")
            cluster = model.fit(points, sample_weight=weights).labels_
    sizes = np.array(
        [weights[cluster == j].sum() for j in range(min(max_cluster_count, len(points)))], dtype=np.int64
    )
    order = [j for j in np.argsort(-sizes, kind="stable") if sizes[j] > 0]
    centres = [weights[cluster == j] @ points[cluster == j] / sizes[j] for j in order]
    return np.array(centres).reshape(len(order), points.shape[1]), sizes[order]
