"""Parts of a training split by class: folds that validate, and equal numbers of each class."""

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


def rank_within_class(labels: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return, per sample, how many of its class come before it, and how many there are."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts[labels]


def mark_per_class(labels: Labels, n: int) -> Mask:
    """Mark n samples of each class, evenly spaced in order; all of a class that has no more."""
    rank, count = rank_within_class(labels)
    marked: Mask = (rank + 1) * n // count > rank * n // count
    return marked


def mark_fold(labels: Labels, fold: int, folds: int) -> Mask:
    """Mark one fold: every so-manieth sample of each class, counted from its last.

    A class with fewer samples than there are folds has one in each of the first folds. The only sample of a
    class is in none, since no classifier could know the class then.
    """
    rank, count = rank_within_class(labels)
    marked: Mask = ((count - 1 - rank) % folds == fold) & (count > 1)
    return marked


def make_folds(labels: Labels, folds: int, enough: int, most: int) -> list[Mask]:
    """Cut a training split into folds, and return as many of them as it takes to validate on enough samples.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
    folds : int
        The samples of a class are divided among so many, or among as many as the largest class has samples.
    enough : int
        Samples; no further fold is returned once those before hold as many.
    most : int
        Folds that are returned at most.

    Returns
    -------
    list of ndarray of bool, shape (n,)
        Empty if no class has two samples.
    """
    folds = min(folds, int(np.bincount(labels).max(initial=0)))
    found: list[Mask] = []
    while len(found) < min(folds, most) and sum(int(held.sum()) for held in found) < enough:
        held = mark_fold(labels, len(found), folds)
        if not held.any():
            break
        found.append(held)
    return found
