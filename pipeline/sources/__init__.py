"""Where labelled images come from.

A source is data: two splits of encoded samples, class ids, and a function that decodes one sample. To add a
kind of source, write a function that returns a :class:`Source` and name it in :data:`KINDS`.
"""

import difflib
from collections.abc import Callable

from sfm.errors import InputError
from sfm.pipeline.sources.folder import folder_source
from sfm.pipeline.sources.idx import builtin_source, idx_source
from sfm.pipeline.sources.source import Source, Split, require_usable

__all__ = ["KINDS", "Source", "Split", "open_source"]

KINDS: dict[str, Callable[[str], Source]] = {
    "folder": folder_source,
    "idx": idx_source,
    "builtin": builtin_source,
}


def open_source(spec: str) -> Source:
    """Open the source that a spec such as ``folder:PATH`` means, and check that it can be used.

    Raises
    ------
    InputError
        If the kind is unknown, nothing is there, or its classes cannot be distilled.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS)
        hint = (
            f"did you mean {close[0]}:{rest or 'PATH'}?"
            if close
            else "use folder:PATH, idx:PATH or builtin:NAME"
        )
        raise InputError(f"unknown dataset {spec!r}: {hint}")
    source = KINDS[kind](rest)
    require_usable(source)
    return source
