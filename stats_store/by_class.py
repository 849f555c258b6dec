"""How well the classifier of an entry recognises every class, from what the entry holds. Arrays only."""

import numpy as np
import numpy.typing as npt

from sfm.errors import DamageError
from sfm.stats_store.accuracy import ranks
from sfm.stats_store.store import Entry

ROWS_AT_ONCE = 4096


def held_out_by_class(entry: Entry) -> npt.NDArray[np.float64] | None:
    """Return the share of every class's held-out samples that the stored classifier is right about.

    A tie is never right. Reads the held-out features block by block.

    Returns
    -------
    ndarray, shape (class,), or None
        NaN for a class without held-out samples; None where the entry keeps no held-out features.

    Raises
    ------
    DamageError
        If the classifier or a feature is not finite.
    """
    if "test/feature" not in entry:
        return None
    weight, bias = entry.read("classifier/weight"), entry.read("classifier/bias")
    labels = entry.read("test/label")
    right = np.zeros(len(labels), dtype=bool)
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(labels)))
        logits = entry.read("test/feature", rows).astype(np.float32) @ weight.T + bias
        try:
            right[rows] = ranks(logits, labels[rows]) < 1
        except FloatingPointError as error:
            raise DamageError(f"the entry of {entry.summary.dataset} is not sound: {error}") from error
    with np.errstate(invalid="ignore"):
        shares: npt.NDArray[np.float64] = np.bincount(labels, right, minlength=len(weight)) / np.bincount(
            labels, minlength=len(weight)
        )
    return shares
