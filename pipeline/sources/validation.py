"""Which classes can be distilled."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.text import format_names


def require_distillable_classes(
    spec: str, class_ids: Sequence[str], counts: dict[str, npt.NDArray[np.int64]], when: str = ""
) -> None:
    """Refuse classes that cannot be distilled.

    Parameters
    ----------
    spec : str
        What the user wrote.
    counts : dict of str to ndarray of int64, shape (C,)
        Samples per class, by split.
    when : str
        Said after "no images in class ...", e.g. " once unreadable ones are skipped".

    Raises
    ------
    InputError
        If there are fewer than two classes, two are told apart by writing alone, or one has no sample in a
        split; names it.
    """
    if len(class_ids) < 2:
        found = class_ids[0] if class_ids else "none"
        raise InputError(
            f"{spec} has fewer than two classes (found: {found}); the flow of a class points to the "
            f"others, so at least two are needed"
        )
    alike: dict[str, str] = {}
    for class_id in class_ids:
        other = alike.setdefault(unicodedata.normalize("NFKC", class_id).casefold().strip(), class_id)
        if other != class_id:
            raise InputError(
                f"{spec} has classes {other!r} and {class_id!r}, the same but for how they are written: "
                f"make them one class, or give them names that differ"
            )
    for split_name, count in counts.items():
        empty = [class_ids[c] for c in np.flatnonzero(count == 0).tolist()]
        if empty:
            raise InputError(
                f"{spec} has no {split_name} images in class {format_names(empty)}{when}; remove the class "
                f"or add images, or leave it out with ?classes=LIST"
            )
