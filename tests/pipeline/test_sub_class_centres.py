"""Sub-class centres are the means of the samples nearest to them; every sample counts once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans

from sfm.pipeline import sub_class_centres as module
from sfm.pipeline.staged_features import StagedPartition
from sfm.pipeline.staging import Staging
from sfm.pipeline.sub_class_centres import (
    compute_sub_class_centres,
    find_nearest_centres,
    group_consecutive_classes,
)


def stage_features(tmp_path, features, labels):
    staging, parts = Staging(tmp_path), []
    for number, start in enumerate(range(0, len(labels), 40)):
        rows = slice(start, start + 40)
        partition = StagedPartition("train", number, np.arange(len(labels))[rows], labels[rows])
        staging.write_array("toy", partition, features[rows])
        parts.append(partition)
    return staging.open_features("toy", parts)


def draw_blobs(sizes, rng):
    corners = np.array([[0, 0], [20, 0], [0, 20]], dtype=np.float32)
    features = np.concatenate([corners[i] + rng.standard_normal((n, 2)) for i, n in enumerate(sizes)])
    return features.astype(np.float32)


def test_well_separated_clusters_are_found_largest_first(tmp_path):
    rng = np.random.default_rng(0)
    features = np.concatenate([draw_blobs((30, 50, 20), rng), draw_blobs((10, 10, 40), rng) + 100])
    labels = np.repeat([0, 1], [100, 60]).astype(np.int32)
    order = rng.permutation(160)
    train = stage_features(tmp_path, features[order], labels[order])
    centre, count = compute_sub_class_centres(train, labels[order], 2, 2, [3], seed=0)[3]
    assert count.tolist() == [[50, 30, 20], [40, 10, 10]]
    np.testing.assert_allclose(centre[0, 0], features[30:80].mean(axis=0), rtol=1e-5)
    assert centre.dtype == np.float32


def test_count_weighted_centres_average_to_the_class_mean(tmp_path):
    rng = np.random.default_rng(1)
    features = rng.standard_normal((90, 6)).astype(np.float32)
    labels = rng.integers(0, 3, 90).astype(np.int32)
    centres = compute_sub_class_centres(
        stage_features(tmp_path, features, labels), labels, 3, 6, [2, 4], seed=0
    )
    for centre, count in centres.values():
        for c in range(3):
            assert count[c].sum() == (labels == c).sum()
            mean = (count[c, :, None] * centre[c]).sum(axis=0) / count[c].sum()
            np.testing.assert_allclose(mean, features[labels == c].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_bit_for_bit_equal_centres(tmp_path):
    rng = np.random.default_rng(2)
    features, labels = rng.standard_normal((80, 4)).astype(np.float32), np.zeros(80, dtype=np.int32)
    train = stage_features(tmp_path, features, labels)
    first, again = (compute_sub_class_centres(train, labels, 1, 4, [5], seed=7)[5] for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])


def test_a_class_with_too_few_samples_has_nan_centres_with_count_zero(tmp_path):
    features = np.array([[0, 0], [5, 5], [9, 9], [9, 9], [9, 9]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 1], dtype=np.int32)
    centre, count = compute_sub_class_centres(
        stage_features(tmp_path, features, labels), labels, 2, 2, [3], seed=0
    )[3]
    assert count.tolist() == [[1, 1, 0], [3, 0, 0]]
    assert np.isnan(centre[0, 2]).all()
    assert np.isnan(centre[1, 1:]).all()
    np.testing.assert_array_equal(centre[1, 0], [9, 9])


def test_a_nan_centre_is_never_the_nearest():
    centres = np.array([[np.nan, np.nan], [3.0, 3.0]])
    assert find_nearest_centres(np.zeros((2, 2)), centres).tolist() == [1, 1]


def compute_inertia(rows, centres):
    return np.square(rows - centres[find_nearest_centres(rows.astype(np.float64), centres)]).sum()


@pytest.mark.parametrize("k", [3, 10])
def test_centres_fitted_on_a_subset_are_no_worse_than_mini_batch_k_means(tmp_path, monkeypatch, k):
    rng = np.random.default_rng(3)
    scale = 1.5 * rng.standard_normal((12, 8))
    features = (scale[rng.integers(0, 12, 1500)] + rng.standard_normal((1500, 8))).astype(np.float32)
    labels = np.zeros(1500, dtype=np.int32)
    train = stage_features(tmp_path, features, labels)
    monkeypatch.setattr(module, "MAX_ROWS_PER_CLASS", 500)
    theirs, ours = [], []
    for seed in range(5):
        centre, _ = compute_sub_class_centres(train, labels, 1, 8, [k], seed=seed)[k]
        ours.append(compute_inertia(features, centre[0].astype(np.float64)))
        model = MiniBatchKMeans(k, n_init=1, batch_size=256, random_state=seed).fit(features)
        theirs.append(compute_inertia(features, model.cluster_centers_.astype(np.float64)))
    assert np.mean(ours) <= np.mean(theirs)


def test_no_sub_class_is_empty_with_enough_distinct_samples(tmp_path):
    features = np.zeros((300, 3), dtype=np.float32)
    features[7], features[120], features[299] = (1, 0, 0), (0, 1e-3, 0), (0, 0, 50)
    labels = np.zeros(300, dtype=np.int32)
    _, count = compute_sub_class_centres(
        stage_features(tmp_path, features, labels), labels, 1, 3, [4], seed=0
    )[4]
    assert count.tolist() == [[297, 1, 1, 1]]


def test_centres_are_independent_of_the_number_of_classes_in_memory(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    features = rng.standard_normal((200, 4)).astype(np.float32)
    labels = rng.integers(0, 5, 200).astype(np.int32)
    train = stage_features(tmp_path, features, labels)
    together = compute_sub_class_centres(train, labels, 5, 4, [3], seed=1)[3]
    monkeypatch.setattr(module, "MAX_CLUSTERING_BYTES", 1)
    one_by_one = compute_sub_class_centres(train, labels, 5, 4, [3], seed=1)[3]
    for a, b in zip(together, one_by_one, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.lists(st.integers(0, 30), min_size=1), st.integers(1, 60))
def test_class_groups_hold_every_class_once_within_the_sample_limit(sizes, most):
    groups = group_consecutive_classes(np.array(sizes), most)
    assert [c for group in groups for c in group] == list(range(len(sizes)))
    assert all(len(group) == 1 or sum(sizes[c] for c in group) <= most for group in groups)
