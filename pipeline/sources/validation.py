"""Refuse datasets whose classes cannot be distilled."""

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.text import format_names


def require_distillable_classes(
    spec: str,
    class_ids: Sequence[str],
    sample_counts_by_split: Mapping[str, npt.NDArray[np.int64]],
    condition_in_message: str = "",
) -> None:
    """Refuse fewer than two classes, classes that differ only in spelling, and empty classes.

    Parameters
    ----------
    spec : str
        Dataset spec, for messages.
    sample_counts_by_split : mapping of str to ndarray of int64, shape (C,)
        Samples per class, by split.
    condition_in_message : str
        Follows "has no … images in class …", e.g. " once unreadable ones are skipped".

    Raises
    ------
    InputError
        With the classes and the split.
    """
    if len(class_ids) < 2:
        found = class_ids[0] if class_ids else "none"
        raise InputError(
            f"{spec} has fewer than two classes (found: {found}); the flow of a class points to the "
            f"others, so at least two are needed"
        )
    ids_by_spelling: dict[str, str] = {}
    for class_id in class_ids:
        spelling = unicodedata.normalize("NFKC", class_id).casefold().strip()
        other_id = ids_by_spelling.setdefault(spelling, class_id)
        if other_id != class_id:
            raise InputError(
                f"{spec} has classes {other_id!r} and {class_id!r}, the same but for how they are written: "
                f"make them one class, or give them names that differ"
            )
    for split_name, class_counts in sample_counts_by_split.items():
        empty = [class_ids[c] for c in np.flatnonzero(class_counts == 0).tolist()]
        if empty:
            raise InputError(
                f"{spec} has no {split_name} images in class {format_names(empty)}{condition_in_message}; "
                f"remove the class or add images, or leave it out with ?classes=LIST"
            )
