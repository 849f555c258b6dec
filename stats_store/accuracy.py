"""Top-1 and top-5 accuracy of a linear classifier, counted as evaluation counts them."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

TOP = 5


def ranks(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return the rank of each sample's right class among its logits; 0 is first.

    Ties are wrong: an equal logit of another class ranks first, so a classifier that says the same of every
    class is never right. :func:`sfm.eval.head_accuracy.rank_true_class` is the same rule for tensors, and a
    test holds the two against each other.

    Parameters
    ----------
    logits : ndarray, shape (n, C)
    labels : ndarray, shape (n,)

    Raises
    ------
    FloatingPointError
        If a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise FloatingPointError("logits are not finite: the classifier diverged or its features are not")
    right = logits[np.arange(len(labels)), labels]
    found: npt.NDArray[np.int64] = (logits >= right[:, None]).sum(axis=1) - 1
    return found


def top_accuracies(
    blocks: Iterable[tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]],
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> tuple[float | None, float | None]:
    """Return top-1 and top-5 accuracy of ``logits = feature @ weight.T + bias``, as fractions.

    Both are None without samples; top-5 is None with fewer than five classes.

    Raises
    ------
    FloatingPointError
        If a logit is not finite.
    """
    right, samples = np.zeros(2), 0
    for features, labels in blocks:
        rank = ranks(features @ weight.T + bias, labels)
        right += (rank < 1).sum(), (rank < TOP).sum()
        samples += len(labels)
    if not samples:
        return None, None
    return float(right[0] / samples), float(right[1] / samples) if len(bias) >= TOP else None
