"""Masks of a training split, balanced by class: validation folds, and equal numbers of each class."""

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


def rank_and_count_within_class(labels: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return, per sample, its rank among the samples of its class, and their number."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts[labels]


def make_even_per_class_mask(labels: Labels, max_per_class: int) -> Mask:
    """Mark up to `max_per_class` samples of each class, evenly spaced in order."""
    rank, count = rank_and_count_within_class(labels)
    marked: Mask = (rank + 1) * max_per_class // count > rank * max_per_class // count
    return marked


def make_fold_mask(labels: Labels, fold_index: int, fold_count: int) -> Mask:
    """Mark one fold: every `fold_count`-th sample of each class, counted from its last.

    A class with fewer samples than there are folds has one in each of the first folds. The only sample of a
    class is in no fold, since no classifier could learn the class then.
    """
    rank, count = rank_and_count_within_class(labels)
    marked: Mask = ((count - 1 - rank) % fold_count == fold_index) & (count > 1)
    return marked


def make_validation_masks(
    labels: Labels, fold_count: int, min_validation_samples: int, max_returned_folds: int
) -> list[Mask]:
    """Cut a training split into folds, and return as many as hold a minimum number of samples.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
    fold_count : int
        Number of folds that the samples of a class are divided among; at most the size of the largest class.
    min_validation_samples : int
        Folds are added until they hold this number of samples.
    max_returned_folds : int
        Maximum number of folds to return.

    Returns
    -------
    list of ndarray of bool, shape (n,)
        Empty if no class has two samples.
    """
    fold_count = min(fold_count, int(np.bincount(labels).max(initial=0)))
    masks: list[Mask] = []
    while (
        len(masks) < min(fold_count, max_returned_folds)
        and sum(int(held_out.sum()) for held_out in masks) < min_validation_samples
    ):
        held_out = make_fold_mask(labels, len(masks), fold_count)
        if not held_out.any():
            break
        masks.append(held_out)
    return masks
