"""Held-out accuracy of every class, from the stored classifier and the stored features of an entry."""

import numpy as np
import numpy.typing as npt

from sfm.errors import DamageError
from sfm.stats_store.classifier_accuracy import compute_label_ranks
from sfm.stats_store.store import Entry

ROWS_PER_BLOCK = 4096


def compute_held_out_class_accuracies(entry: Entry) -> npt.NDArray[np.float64] | None:
    """Return the stored classifier's top-1 accuracy on the held-out samples of every class.

    A tie counts as wrong. The held-out features are read block by block.

    Returns
    -------
    ndarray, shape (class,), or None
        NaN for a class without held-out samples; None if the entry stores no held-out features.

    Raises
    ------
    DamageError
        If the classifier or a feature is not finite.
    """
    if "test/feature" not in entry:
        return None
    weight, bias = entry.read_array("classifier/weight"), entry.read_array("classifier/bias")
    labels = entry.read_array("test/label")
    is_correct = np.zeros(len(labels), dtype=bool)
    for start in range(0, len(labels), ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, len(labels)))
        logits = entry.read_array("test/feature", rows).astype(np.float32) @ weight.T + bias
        try:
            is_correct[rows] = compute_label_ranks(logits, labels[rows]) < 1
        except FloatingPointError as error:
            raise DamageError(f"the entry of {entry.summary.dataset} is damaged: {error}") from error
    correct = np.bincount(labels, is_correct, minlength=len(weight))
    with np.errstate(invalid="ignore"):
        accuracies: npt.NDArray[np.float64] = correct / np.bincount(labels, minlength=len(weight))
    return accuracies
