"""Accuracy by class, from what an entry holds."""

import numpy as np

from sfm.stats_store.class_accuracies import compute_held_out_class_accuracies


class ArraysInMemory:
    """An entry, as far as this needs one."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = {name.replace("_", "/", 1): array for name, array in arrays.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def read_array(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.arrays[name][rows or slice(None)]


def test_class_accuracy_counts_ties_as_wrong_and_is_nan_without_samples() -> None:
    entry = ArraysInMemory(
        classifier_weight=np.eye(3, 2, dtype=np.float32),
        classifier_bias=np.zeros(3, np.float32),
        test_feature=np.array([[1, 0], [0, 0], [0, 1], [1, 0]], np.float16),
        test_label=np.array([0, 0, 1, 1], np.int32),
    )
    np.testing.assert_array_equal(compute_held_out_class_accuracies(entry), [0.5, 0.5, np.nan])


def test_class_accuracies_are_none_without_held_out_features() -> None:
    assert compute_held_out_class_accuracies(ArraysInMemory()) is None
