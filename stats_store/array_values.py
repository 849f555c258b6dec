"""Check the values of an entry's arrays: functions that return a problem in one line, or None.

Digests show that the bytes are those of the writer; these functions show that the numbers can be statistics
of a dataset, so that code that computes with them need not check again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sfm.stats_store.cards import DatasetCard
from sfm.stats_store.schema import strip_sub_class_suffix

SCATTER_TOLERANCE = 1e-6
"""Tolerance relative to the largest diagonal element of a scatter; rounding causes 1e-15, also in merges."""

COMPARED_ROWS = 256
"""Rows of a matrix that are compared at a time, to avoid a copy of all."""

EXEMPLAR_ROLES = (0, 1, 255)
"""Random, nearest to the class mean, none: see :mod:`sfm.pipeline.exemplars`."""

AnyArray = npt.NDArray[Any]


def find_value_problem(array_name: str, rows: AnyArray, dataset: DatasetCard) -> str | None:
    """Return what is wrong with the values of an array, or of some of its rows; None if nothing is.

    Conditions on all rows together are checked only if all rows are given.

    Parameters
    ----------
    array_name : str
        Name of an array of the schema.
    rows : ndarray
        Consecutive rows, in the shape that the cards of the entry declare.
    dataset : DatasetCard
        Card of the entry.
    """
    name = strip_sub_class_suffix(array_name)
    if not rows.size:
        return None
    if check_with_dataset := VALUE_CHECKS_WITH_DATASET.get(name):
        return check_with_dataset(rows, dataset)
    check = VALUE_CHECKS.get(name)
    return check(rows) if check else None


def find_nonfinite_problem(rows: AnyArray) -> str | None:
    """Return a problem unless all values are finite.

    Examples
    --------
    >>> find_nonfinite_problem(np.array([1.0, np.nan]))
    '1 of 2 values is not finite'
    """
    # A non-finite value makes the sum non-finite. The sum may also overflow, so then every value is checked.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum(dtype=np.float64)):
            return None
    invalid_count = rows.size - np.count_nonzero(np.isfinite(rows))
    return (
        f"{invalid_count} of {rows.size} values {'is' if invalid_count == 1 else 'are'} not finite"
        if invalid_count
        else None
    )


def find_scatter_diagonal_problem(rows: AnyArray) -> str | None:
    """Return a problem unless all values are finite and at least zero, as sums of squares are."""
    return find_nonfinite_problem(rows) or ("a sum of squares is negative" if rows.min() < 0 else None)


def find_scatter_matrix_problem(rows: AnyArray) -> str | None:
    """Return a problem unless a scatter matrix is finite, symmetric and has no negative diagonal.

    If only some of its rows are given, only finiteness is checked.
    """
    if (problem := find_nonfinite_problem(rows)) or rows.shape[0] != rows.shape[1]:
        return problem
    diagonal = np.diagonal(rows)
    if diagonal.min() < 0:
        return "a sum of squares on its diagonal is negative"
    max_difference = SCATTER_TOLERANCE * diagonal.max()
    for start in range(0, len(rows), COMPARED_ROWS):
        block = slice(start, start + COMPARED_ROWS)
        # Up to the block on the diagonal: the rest is compared as the transpose of later blocks.
        with np.errstate(over="ignore"):
            difference = np.abs(rows[block, : start + COMPARED_ROWS] - rows[: start + COMPARED_ROWS, block].T)
        if difference.max() > max_difference:
            return "it is not symmetric"
    return None


def find_samples_per_class_problem(sample_counts: AnyArray, dataset: DatasetCard) -> str | None:
    """Return a problem unless class counts add up to the training samples; a class may have none."""
    total = dataset.train_samples
    if sample_counts.min() < 0 or sample_counts.max() > total:
        return f"counts from {sample_counts.min()} to {sample_counts.max()} of {total} training samples"
    if len(sample_counts) == len(dataset.class_ids) and (total_count := sum(sample_counts.tolist())) != total:
        return f"{total_count} samples, the dataset has {total} training samples"
    return None


def find_samples_per_sub_class_problem(sample_counts: AnyArray, dataset: DatasetCard) -> str | None:
    """Return a problem unless counts of sub-classes are possible for the number of training samples."""
    if sample_counts.min() < 0 or sample_counts.sum(axis=1, dtype=np.float64).max() > dataset.train_samples:
        return (
            f"counts from {sample_counts.min()} to {sample_counts.max()} of {dataset.train_samples} training "
            f"samples"
        )
    return None


def find_missing_centre_problem(centres: AnyArray, sample_counts: AnyArray) -> str | None:
    """Return a problem unless every sub-class that has samples has a finite centre.

    Parameters
    ----------
    centres : ndarray, shape (C, K, D)
        NaN where a class has fewer samples than sub-classes.
    sample_counts : ndarray of int, shape (C, K)
        Samples of every sub-class.
    """
    return describe_missing_centres_if_any(~compute_finite_centre_mask(centres) & (sample_counts > 0))


def describe_missing_centres_if_any(missing_centre_mask: AnyArray) -> str | None:
    """Return a problem if any sub-class, shape (C, K), has samples but no centre."""
    missing_count = np.count_nonzero(missing_centre_mask)
    return f"{missing_count} sub-classes have samples and no finite centre" if missing_count else None


def compute_finite_centre_mask(centres: AnyArray) -> npt.NDArray[np.bool_]:
    """Return which sub-classes have a finite centre: bool of shape (C, K) for centres (C, K, D)."""
    is_finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(centres).all(axis=2))
    return is_finite


def find_label_problem(labels: AnyArray, dataset: DatasetCard) -> str | None:
    """Return a problem unless all labels are class numbers."""
    classes = len(dataset.class_ids)
    if labels.min() < 0 or labels.max() >= classes:
        return f"labels from {labels.min()} to {labels.max()} of {classes} classes"
    return None


def find_exemplar_role_problem(roles: AnyArray) -> str | None:
    """Return a problem unless all exemplar roles are known."""
    return (
        None
        if np.isin(roles, EXEMPLAR_ROLES).all()
        else f"roles other than {', '.join(map(str, EXEMPLAR_ROLES))}"
    )


def find_exemplar_sample_number_problem(sample_numbers: AnyArray) -> str | None:
    """Return a problem unless all exemplar samples are sample numbers, or -1 for none."""
    return None if sample_numbers.min() >= -1 else f"sample {sample_numbers.min()}"


VALUE_CHECKS: dict[str, Callable[[AnyArray], str | None]] = {
    "train/mean": find_nonfinite_problem,
    "train/scatter_diagonal": find_scatter_diagonal_problem,
    "train/within_scatter": find_scatter_matrix_problem,
    "classifier/weight": find_nonfinite_problem,
    "classifier/bias": find_nonfinite_problem,
    "test/feature": find_nonfinite_problem,
    "train/feature": find_nonfinite_problem,
    "exemplar/role": find_exemplar_role_problem,
    "exemplar/sample": find_exemplar_sample_number_problem,
}

VALUE_CHECKS_WITH_DATASET: dict[str, Callable[[AnyArray, DatasetCard], str | None]] = {
    "train/count": find_samples_per_class_problem,
    "train/centre_count": find_samples_per_sub_class_problem,
    "test/label": find_label_problem,
    "train/label": find_label_problem,
}

BLOCK_REDUCTIONS: dict[str, Callable[[AnyArray, int], AnyArray]] = {
    "train/count": lambda rows, _start: rows,
    "train/scatter_diagonal": lambda rows, _start: rows.sum(axis=0, keepdims=True),
    "train/within_scatter": lambda rows, start: np.diagonal(rows, start),
    "train/centre": lambda rows, _start: compute_finite_centre_mask(rows),
    "train/centre_count": lambda rows, _start: rows,
}
"""What :class:`ArrayConsistencyCheck` keeps of rows, given the number of the first one."""


@dataclass
class ArrayConsistencyCheck:
    """Compares the arrays of an entry with each other while they are read in blocks, from the first row on.

    It keeps little of each array: see ``BLOCK_REDUCTIONS``.
    """

    reduced_blocks_by_array: dict[str, list[AnyArray]] = field(default_factory=dict)

    def add_rows(self, array_name: str, rows: AnyArray, first_row_index: int) -> None:
        """Add rows of an array, of which `first_row_index` is the first."""
        reduce_block = BLOCK_REDUCTIONS.get(strip_sub_class_suffix(array_name))
        if reduce_block:
            self.reduced_blocks_by_array.setdefault(array_name, []).append(
                np.array(reduce_block(rows, first_row_index))
            )

    def find_contradictions_by_array(self) -> dict[str, str]:
        """Return how arrays contradict each other, by name, after all rows of all arrays were added."""
        reduced_arrays = {name: np.concatenate(parts) for name, parts in self.reduced_blocks_by_array.items()}
        problems = {
            name: find_contradiction_with_other_arrays(name, reduced_arrays) for name in reduced_arrays
        }
        return {name: problem for name, problem in problems.items() if problem}


def find_contradiction_with_other_arrays(
    array_name: str, reduced_arrays_by_name: dict[str, AnyArray]
) -> str | None:
    """Return how an array contradicts other arrays, or None; see ``BLOCK_REDUCTIONS``."""
    count = reduced_arrays_by_name.get(array_name.replace("train/centre_", "train/centre_count_"))
    match strip_sub_class_suffix(array_name):
        case "train/centre" if count is not None:
            return describe_missing_centres_if_any(~reduced_arrays_by_name[array_name] & (count > 0))
        case "train/centre_count" if "train/count" in reduced_arrays_by_name:
            is_exceeded = (
                reduced_arrays_by_name[array_name].sum(axis=1) > reduced_arrays_by_name["train/count"]
            )
            return f"more samples than {is_exceeded.sum()} classes have" if is_exceeded.any() else None
        case "train/within_scatter" if "train/scatter_diagonal" in reduced_arrays_by_name:
            return find_scatter_sum_problem(
                reduced_arrays_by_name[array_name], reduced_arrays_by_name["train/scatter_diagonal"]
            )
    return None


def find_scatter_sum_problem(
    within_scatter_diagonal: AnyArray, class_scatter_diagonals: AnyArray
) -> str | None:
    """Return a problem unless the scatters of all classes add up to the pooled one.

    Parameters
    ----------
    within_scatter_diagonal : ndarray, shape (D,)
        Diagonal of the pooled within-class scatter.
    class_scatter_diagonals : ndarray, shape (C, D)
        Scatter diagonals of classes, or sums of them.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(within_scatter_diagonal - class_scatter_diagonals.sum(axis=0)).max(initial=0)
    is_close = difference <= SCATTER_TOLERANCE * within_scatter_diagonal.max(initial=0)
    return None if is_close else "its diagonal is not the sum of train/scatter_diagonal"
