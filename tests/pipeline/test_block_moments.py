"""Moments are exact for any blocks in any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfm.pipeline.block_moments import accumulate_moments, compute_moments
from sfm.stats_store.class_moments import ClassMoments, make_empty_moments, merge_moments

CLASSES, FEATURES = 4, 5


def compute_in_two_passes(features: np.ndarray, labels: np.ndarray) -> ClassMoments:
    """The definition, in plain numpy over all samples at once."""
    rows = features.astype(np.float64)
    result = make_empty_moments(CLASSES, FEATURES)
    for c in range(CLASSES):
        own = rows[labels == c]
        if len(own) == 0:
            continue
        result.count[c] = len(own)
        result.mean[c] = own.mean(axis=0)
        deviation = own - own.mean(axis=0)
        result.scatter_diagonal[c] = (deviation**2).sum(axis=0)
        result.within_scatter[:] += deviation.T @ deviation
    return result


def assert_equal(a: ClassMoments, b: ClassMoments, rtol: float) -> None:
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=1e-12)
    scale = max(1e-12, float(np.abs(b.within_scatter).max()))
    np.testing.assert_allclose(a.scatter_diagonal, b.scatter_diagonal, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(a.within_scatter, b.within_scatter, rtol=rtol, atol=rtol * scale)


@st.composite
def draw_labelled_features(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset = draw(st.sampled_from([0.0, 1.0, 100.0]))
    features = (offset + rng.standard_normal((n, FEATURES))).astype(np.float32)
    return features, rng.integers(0, CLASSES, n).astype(np.int32)


@given(draw_labelled_features(), st.integers(1, 20))
def test_moments_are_independent_of_the_block_size(data, size):
    features, labels = data
    blocks = [(features[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]
    assert_equal(
        accumulate_moments(blocks, CLASSES, FEATURES), compute_in_two_passes(features, labels), rtol=1e-9
    )


@given(draw_labelled_features(), st.randoms(use_true_random=False))
def test_moments_merge_in_any_order(data, random):
    features, labels = data
    cuts = sorted(random.sample(range(len(labels) + 1), min(3, len(labels) + 1)))
    parts = [
        compute_moments(f, y, CLASSES)
        for f, y in zip(np.split(features, cuts), np.split(labels, cuts), strict=True)
    ]
    random.shuffle(parts)
    total = make_empty_moments(CLASSES, FEATURES)
    for part in parts:
        total = merge_moments(part, total) if random.random() < 0.5 else merge_moments(total, part)
    assert_equal(total, compute_in_two_passes(features, labels), rtol=1e-9)


def test_moments_of_real_features_match_a_two_pass_computation(fashion_store):
    from sfm.stats_store.entry_selection import select_only_summary
    from sfm.stats_store.store import open_store

    store = open_store(fashion_store)
    entry = store.open_entry(
        select_only_summary(store.list_summaries(), dataset="fashion-mnist-6k@tuning", backbone_spec="lite0")
    )
    features = entry.read_array("test/feature").astype(np.float32)
    labels = entry.read_array("test/label")
    got = accumulate_moments(
        [(features[:33], labels[:33]), (features[33:], labels[33:])], 10, features.shape[1]
    )
    for c in range(10):
        own = features[labels == c].astype(np.float64)
        np.testing.assert_allclose(got.mean[c], own.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(
            got.scatter_diagonal[c], ((own - own.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-6, atol=1e-12
        )


@settings(max_examples=20)
@given(draw_labelled_features())
def test_the_pooled_scatter_diagonal_is_the_sum_of_the_class_diagonals(data):
    moments = compute_moments(*data, CLASSES)
    np.testing.assert_allclose(
        np.diag(moments.within_scatter), moments.scatter_diagonal.sum(axis=0), rtol=1e-9, atol=1e-9
    )


def test_a_class_without_samples_does_not_change_the_moments():
    features = np.ones((3, FEATURES), dtype=np.float32)
    only_class_1 = compute_moments(features, np.full(3, 1, dtype=np.int32), CLASSES)
    merged = merge_moments(only_class_1, make_empty_moments(CLASSES, FEATURES))
    assert merged.count.tolist() == [0, 3, 0, 0]
    assert np.isfinite(merged.mean).all()
    assert merged.mean[1] == pytest.approx(np.ones(FEATURES))
