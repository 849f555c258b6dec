"""Names of classes where there is little room for them."""

import os
import re
from collections.abc import Sequence


def short_captions(names: Sequence[str]) -> list[str]:
    """Drop what all names begin with: a number of their own, and words that they share.

    "001.Black_footed_Albatross", "002.Laysan_Albatross" become "Black_footed_Albatross", "Laysan_Albatross";
    "bird/owl", "bird/crow" become "owl", "crow". Names that would be empty or less distinct stay as they are.
    """
    unnumbered = [re.sub(r"^\d+[\s._\-/]+", "", name) for name in names]
    numbered = all(re.match(r"\d+[\s._\-/]+", name) for name in names)
    kept = unnumbered if numbered and as_distinct(unnumbered, names) else list(names)
    shared = re.match(r".*[^\w]|.*_|", os.path.commonprefix(kept), re.DOTALL)  # noqa: RUF071
    shortened = [name[shared.end() if shared else 0 :] for name in kept]
    return shortened if as_distinct(shortened, names) else kept


def as_distinct(shortened: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether several names are still told apart, and none is empty."""
    return len(names) > 1 and all(shortened) and len(set(shortened)) == len(set(names))
