"""Where labelled images come from.

A source is data: two splits of encoded samples, class ids, and a function that decodes one sample; see
:mod:`sfm.pipeline.sources.source`, with an example. To add a kind of source, write a function that returns a
:class:`Source` and name it in :data:`KINDS`; or, in a package of your own, declare it as an entry point of
the group :data:`PLUGINS`, with the kind as its name.
"""

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points

import numpy as np

from sfm.errors import InputError
from sfm.pipeline.sources.folder import folder_source
from sfm.pipeline.sources.idx import builtin_source, idx_source
from sfm.pipeline.sources.source import Sample, Shard, Source, Split, require_usable

__all__ = ["KINDS", "PLUGINS", "Sample", "Shard", "Source", "Split", "open_source"]

KINDS: dict[str, Callable[[str], Source]] = {
    "folder": folder_source,
    "idx": idx_source,
    "builtin": builtin_source,
}

PLUGINS = "sfm.sources"


def open_source(spec: str) -> Source:
    """Open the source that a spec such as ``folder:PATH`` means, and check what is known of it.

    Raises
    ------
    InputError
        If the kind is unknown, nothing is there, or its classes are known and cannot be distilled.
    """
    kind, colon, rest = spec.partition(":")
    plugins = {plugin.name: plugin for plugin in entry_points(group=PLUGINS)}
    if not colon or (kind not in KINDS and kind not in plugins):
        close = difflib.get_close_matches(kind, [*KINDS, *plugins])
        hint = (
            f"did you mean {close[0]}:{rest or 'PATH'}?"
            if close
            else "use folder:PATH, idx:PATH or builtin:NAME"
        )
        raise InputError(f"unknown dataset {spec!r}: {hint}")
    source = KINDS[kind](rest) if kind in KINDS else plugins[kind].load()(rest)
    ids, labels = source.class_ids, source.labels
    if ids is not None and labels is not None:
        counts = {name: np.bincount(own, minlength=len(ids)) for name, own in labels.items()}
        require_usable(source.spec, ids, counts)
    return source
