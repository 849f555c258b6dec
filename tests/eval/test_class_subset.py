import numpy as np
import pytest

from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.stats_store.store import Entry


def test_moments_of_all_classes_equal_the_stored_ones(lite0_entry: Entry) -> None:
    subset = ClassSubsetStatistics(lite0_entry, np.arange(10))
    assert subset.has_all_classes
    moments = subset.read_moments()
    for name in ("count", "mean", "scatter_diagonal", "within_scatter"):
        assert np.array_equal(getattr(moments, name), lite0_entry.read_array(f"train/{name}"))


def test_covariance_of_a_class_subset_is_the_pooled_covariance_of_all_classes(lite0_entry: Entry) -> None:
    subset = ClassSubsetStatistics(lite0_entry, np.array([0, 3, 4]))
    assert not subset.has_all_classes
    moments = subset.read_moments()
    scatter, count = lite0_entry.read_array("train/within_scatter"), lite0_entry.read_array("train/count")
    assert np.allclose(moments.within_scatter / (moments.count.sum() - 3), scatter / (count.sum() - 10))
    assert np.array_equal(moments.mean, lite0_entry.read_array("train/mean")[[0, 3, 4]])


@pytest.mark.parametrize("classes", [[2], [0, 9], list(range(10))])
def test_held_out_samples_of_a_class_subset_are_relabelled(lite0_entry: Entry, classes: list[int]) -> None:
    features, labels = ClassSubsetStatistics(lite0_entry, np.array(classes)).read_held_out_arrays()
    stored = lite0_entry.read_array("test/label")
    rows = np.flatnonzero(np.isin(stored, classes))
    assert [classes[label] for label in labels] == stored[rows].tolist()
    assert np.array_equal(features, lite0_entry.read_array("test/feature")[rows].astype(np.float32))
