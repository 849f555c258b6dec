"""Where labelled images come from.

A source is data: two splits of encoded samples, class ids, and a function that decodes one sample; see
:mod:`sfm.pipeline.sources.source`, with an example. To add a kind of source, write a function that returns a
:class:`Source` and name it in :data:`KINDS`; or, in a package of your own, declare it as an entry point of
the group :data:`PLUGINS`, with the kind as its name. Options after a question mark are the source's own, but
for ``classes``, ``background`` and ``white``, which every source has.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from sfm.backbones.rendering import parse_background, parse_white
from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.classes import ClassList, display_names, read_class_list
from sfm.pipeline.sources.folder import folder_source
from sfm.pipeline.sources.idx import builtin_source, idx_source
from sfm.pipeline.sources.limits import require_listable
from sfm.pipeline.sources.options import join_options, split_options
from sfm.pipeline.sources.parquet import parquet_source
from sfm.pipeline.sources.source import Sample, Shard, Source, Split, of_classes, require_usable
from sfm.pipeline.sources.spelling import with_normal_ids
from sfm.pipeline.sources.torchvision_datasets import torchvision_source
from sfm.pipeline.sources.wds import wds_source
from sfm.stats_store.class_lists import find_class_id, replace_class_ids
from sfm.stats_store.dataset_names import make_dataset_name

__all__ = ["KINDS", "PLUGINS", "Sample", "Shard", "Source", "Split", "open_source"]

KINDS: dict[str, Callable[[str], Source]] = {
    "folder": folder_source,
    "wds": wds_source,
    "parquet": parquet_source,
    "torchvision": torchvision_source,
    "idx": idx_source,
    "builtin": builtin_source,
}

PLUGINS = "sfm.sources"

PARSERS: dict[str, Callable[[str], Any]] = {"background": parse_background, "white": parse_white}
"""Options of every source that say how its images become opaque 8-bit pixels."""


def open_source(spec: str, held_out: bool = True) -> Source:
    """Open the source that a spec such as ``folder:PATH`` means, and check what is known of it.

    Parameters
    ----------
    held_out : bool
        Whether it must have a held-out split.

    Raises
    ------
    InputError
        If the kind is unknown, nothing is there, nothing is held out, or its classes are known and cannot be
        distilled.
    """
    kind, colon, rest = spec.partition(":")
    plugins = {plugin.name: plugin for plugin in entry_points(group=PLUGINS)}
    if not colon or (kind not in KINDS and kind not in plugins):
        kinds = [*KINDS, *plugins]
        close = difflib.get_close_matches(kind, kinds)
        hint = (
            f"did you mean {close[0]}:{rest or 'PATH'}?"
            if close
            else f"write KIND:PLACE, where KIND is one of {', '.join(kinds)}"
        )
        raise InputError(f"unknown dataset {spec!r}: {hint}")
    place, options = split_options(rest)
    chosen = read_class_list(options.pop("classes")) if "classes" in options else None
    given = take_rendering(spec, options)
    rest = join_options(place, options)
    source = KINDS[kind](rest) if kind in KINDS else plugins[kind].load()(rest)
    if held_out and not source.test.shards:
        why = source.inventory.no_held_out or f"{spec} has no held-out split"
        raise InputError(f"{why}; or hold out a tenth of the training images: --hold-out 0.1")
    if source.class_ids is not None:
        require_listable(source.class_ids, source.class_names, source.spec)
    source = with_normal_ids(source)
    if chosen is not None:
        source = replace(subset_of(source, chosen), spec=spec)
    if given:
        source = replace(source, spec=spec, rendering=replace(source.rendering, **given))
    # A plug-in's own name, or a class list's, is checked like one that a user gives.
    source = replace(source, name=make_dataset_name(source.name))
    ids, labels = source.class_ids, source.labels
    if ids is not None and labels is not None:
        counts = {
            name: np.bincount(own, minlength=len(ids))
            for name, own in labels.items()
            if source.splits[name].shards
        }
        require_usable(source.spec, ids, counts)
    return source


def take_rendering(spec: str, options: dict[str, str]) -> dict[str, Any]:
    """Take what is said about `sfm.backbones.rendering.Rendering` out of the options of a spec.

    Raises
    ------
    InputError
        If a background is no colour, or a white no value.
    """
    given: dict[str, Any] = {}
    for name, parse in PARSERS.items():
        try:
            given |= {name: parse(options.pop(name))} if name in options else {}
        except ValueError as error:
            raise InputError(f"{spec}: {error}") from error
    return given


def subset_of(source: Source, chosen: ClassList) -> Source:
    """Return the part of a source that is of some classes, under a name of its own.

    Raises
    ------
    InputError
        If the source is known not to have one of them.
    """
    own = source.class_ids or ()
    chosen = replace_class_ids(chosen, [find_class_id(class_id, own) or class_id for class_id in chosen.ids])
    names = dict(zip(chosen.ids, display_names(chosen.ids), strict=True))
    if source.class_ids is not None and source.class_names is not None:
        names |= dict(zip(source.class_ids, source.class_names, strict=True))
    names |= chosen.names
    part = of_classes(source, chosen.ids, [names[class_id] for class_id in chosen.ids])
    is_file = expand_home(chosen.origin).is_file()
    return replace(part, name=f"{source.name}-{Path(chosen.origin).stem}" if is_file else chosen.origin)
