"""What is wrong with the values of an entry's arrays: pure functions of arrays that return it, or None.

Digests say that bytes are those of the writer; these functions say that the numbers can be statistics of a
dataset. What computes with them need not ask again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.stats_store.cards import DatasetCard
from sfm.stats_store.schema import generic

TOLERANCE = 1e-6
"""Of the largest diagonal element of a scatter. Rounding leaves 1e-15 of it in entries, merged ones too."""

BLOCK_ROWS = 256
"""Rows of a matrix that are compared at a time: no copy of the whole is made."""

ROLES = (0, 1, 255)
"""Random, nearest to the class mean, and none: see :mod:`sfm.pipeline.exemplars`."""

Array = npt.NDArray[Any]


def value_problem(name: str, rows: Array, dataset: DatasetCard) -> str | None:
    """Return what is wrong with an array, or with some of its rows.

    What holds of an array as a whole is asked of the whole only.

    Parameters
    ----------
    name : str
        Of an array of the schema.
    rows : ndarray
        Consecutive rows, in the shape that the entry's cards declare.
    dataset : DatasetCard
        Of the entry.
    """
    check = CHECKS.get(generic(name))
    return check(rows, dataset) if check and rows.size else None


def finite_problem(rows: Array, _dataset: DatasetCard | None = None) -> str | None:
    """Return a problem unless all is finite.

    Examples
    --------
    >>> finite_problem(np.array([1.0, np.nan]))
    '1 of 2 values is not finite'
    """
    # A sum is not finite if a value is not; the reverse does not hold, so all are asked only then.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum(dtype=np.float64)):
            return None
    wrong = rows.size - np.count_nonzero(np.isfinite(rows))
    return f"{wrong} of {rows.size} values {'is' if wrong == 1 else 'are'} not finite" if wrong else None


def scatter_problem(rows: Array, _dataset: DatasetCard | None = None) -> str | None:
    """Return a problem unless all is finite and at least zero, as sums of squares are."""
    return finite_problem(rows) or ("a sum of squares is negative" if rows.min() < 0 else None)


def matrix_problem(rows: Array, _dataset: DatasetCard | None = None) -> str | None:
    """Return a problem unless a scatter matrix is finite, symmetric and has no negative diagonal.

    Of some of its rows only the former is known.
    """
    if (problem := finite_problem(rows)) or rows.shape[0] != rows.shape[1]:
        return problem
    diagonal = np.diagonal(rows)
    if diagonal.min() < 0:
        return "a sum of squares on its diagonal is negative"
    most = TOLERANCE * diagonal.max()
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        # Left of the block, and the block itself: the rest is compared from the other side.
        with np.errstate(over="ignore"):
            apart = np.abs(rows[block, : start + BLOCK_ROWS] - rows[: start + BLOCK_ROWS, block].T)
        if apart.max() > most:
            return "it is not symmetric"
    return None


def count_problem(rows: Array, dataset: DatasetCard) -> str | None:
    """Return a problem unless counts add up to the training samples; a class may have none of them."""
    total = dataset.train_samples
    if rows.min() < 0 or rows.max() > total:
        return f"counts from {rows.min()} to {rows.max()} of {total} training samples"
    if len(rows) == len(dataset.class_ids) and (found := sum(rows.tolist())) != total:
        return f"{found} samples, the dataset has {total} training samples"
    return None


def centre_count_problem(rows: Array, dataset: DatasetCard) -> str | None:
    """Return a problem unless the sub-classes of every class have samples, and not more than there are."""
    if rows.min() < 0 or rows.sum(axis=1, dtype=np.float64).max() > dataset.train_samples:
        return f"counts from {rows.min()} to {rows.max()} of {dataset.train_samples} training samples"
    return None


def centre_problem(centre: Array, count: Array) -> str | None:
    """Return a problem unless every sub-class that has samples has a finite centre.

    Parameters
    ----------
    centre : ndarray, shape (C, K, D)
        NaN where a class has fewer samples than sub-classes.
    count : ndarray of int, shape (C, K)
        Samples of every sub-class.
    """
    return lone_centre_problem(~finite_rows(centre) & (count > 0))


def lone_centre_problem(lacking: Array) -> str | None:
    """Return a problem if sub-classes with samples lack a centre, shape (C, K)."""
    number = np.count_nonzero(lacking)
    return f"{number} sub-classes have samples and no finite centre" if number else None


def finite_rows(centre: Array) -> npt.NDArray[np.bool_]:
    """Say which sub-classes have a finite centre: shape (C, K) of (C, K, D)."""
    found: npt.NDArray[np.bool_] = np.asarray(np.isfinite(centre).all(axis=2))
    return found


def label_problem(rows: Array, dataset: DatasetCard) -> str | None:
    """Return a problem unless all labels number classes."""
    classes = len(dataset.class_ids)
    if rows.min() < 0 or rows.max() >= classes:
        return f"labels from {rows.min()} to {rows.max()} of {classes} classes"
    return None


def role_problem(rows: Array, _dataset: DatasetCard) -> str | None:
    """Return a problem unless all exemplars have a role that there is."""
    return None if np.isin(rows, ROLES).all() else f"roles other than {', '.join(map(str, ROLES))}"


def sample_problem(rows: Array, _dataset: DatasetCard) -> str | None:
    """Return a problem unless all exemplars number a sample, or are none: -1."""
    return None if rows.min() >= -1 else f"sample {rows.min()}"


CHECKS: dict[str, Callable[[Array, DatasetCard], str | None]] = {
    "train/count": count_problem,
    "train/mean": finite_problem,
    "train/scatter_diagonal": scatter_problem,
    "train/within_scatter": matrix_problem,
    "train/centre_count": centre_count_problem,
    "classifier/weight": finite_problem,
    "classifier/bias": finite_problem,
    "test/feature": finite_problem,
    "test/label": label_problem,
    "train/feature": finite_problem,
    "train/label": label_problem,
    "exemplar/role": role_problem,
    "exemplar/sample": sample_problem,
}

KEPT: dict[str, Callable[[Array, int], Array]] = {
    "train/count": lambda rows, _start: rows,
    "train/scatter_diagonal": lambda rows, _start: rows.sum(axis=0, keepdims=True),
    "train/within_scatter": lambda rows, start: np.diagonal(rows, start),
    "train/centre": lambda rows, _start: finite_rows(rows),
    "train/centre_count": lambda rows, _start: rows,
}
"""What is kept of rows, given which is the first, to compare arrays that are never held together."""


@dataclass
class Comparison:
    """Compares the arrays of an entry with each other; they come in parts, each array from its first row on.

    What is kept is small beside the arrays.
    """

    kept: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, name: str, rows: Array, start: int) -> None:
        """Take in some rows of an array, the first of which is `start`."""
        keep = KEPT.get(generic(name))
        if keep:
            self.kept.setdefault(name, []).append(np.array(keep(rows, start)))

    def problems(self) -> dict[str, str]:
        """Return in what arrays contradict each other, by name; all of them must have been taken in whole."""
        whole = {name: np.concatenate(parts) for name, parts in self.kept.items()}
        found = {name: contradiction(name, whole) for name in whole}
        return {name: problem for name, problem in found.items() if problem}


def contradiction(name: str, kept: dict[str, Array]) -> str | None:
    """Return in what an array contradicts others, or None; see ``KEPT``."""
    count = kept.get(name.replace("train/centre_", "train/centre_count_"))
    match generic(name):
        case "train/centre" if count is not None:
            return lone_centre_problem(~kept[name] & (count > 0))
        case "train/centre_count" if "train/count" in kept:
            more = kept[name].sum(axis=1) > kept["train/count"]
            return f"more samples than {more.sum()} classes have" if more.any() else None
        case "train/within_scatter" if "train/scatter_diagonal" in kept:
            return diagonal_problem(kept[name], kept["train/scatter_diagonal"])
    return None


def diagonal_problem(diagonal: Array, scatter_diagonal: Array) -> str | None:
    """Return a problem unless the scatters of all classes add up to the pooled one.

    Parameters
    ----------
    diagonal : ndarray, shape (D,)
        Of the pooled within-class scatter.
    scatter_diagonal : ndarray, shape (C, D)
        Of every class, or sums of them.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.abs(diagonal - scatter_diagonal.sum(axis=0)).max(initial=0)
    fits = apart <= TOLERANCE * diagonal.max(initial=0)
    return None if fits else "its diagonal is not the sum of train/scatter_diagonal"
