"""Top-1 and top-5 accuracy of a linear classifier, with the same rule for ties as evaluation."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

TOP_K = 5


def compute_label_ranks(
    logits: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Return the rank of each sample's label among its logits; 0 is first.

    Ties count as wrong: an equal logit of another class ranks first, so a classifier with constant logits is
    never right. :func:`sfm.eval.head_accuracy.rank_true_class_from_zero` is the same rule for tensors; a
    test compares the two.

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
    label_logits = logits[np.arange(len(labels)), labels]
    label_ranks: npt.NDArray[np.int64] = (logits >= label_logits[:, None]).sum(axis=1) - 1
    return label_ranks


def compute_top1_top5_accuracies(
    feature_label_blocks: Iterable[tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]],
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
    correct, samples = np.zeros(2), 0
    for features, labels in feature_label_blocks:
        label_ranks = compute_label_ranks(features @ weight.T + bias, labels)
        correct += (label_ranks < 1).sum(), (label_ranks < TOP_K).sum()
        samples += len(labels)
    if not samples:
        return None, None
    return float(correct[0] / samples), float(correct[1] / samples) if len(bias) >= TOP_K else None
