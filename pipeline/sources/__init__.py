"""Where labelled images come from.

A source is data: two splits of encoded samples, class ids, and a function that decodes one sample; see
:mod:`sfm.pipeline.sources.source`, with an example. To add a kind of source, write a function that returns a
:class:`Source` and name it in :data:`SOURCE_KINDS`; or, in a package of your own, declare an entry point
of the group :data:`PLUGIN_GROUP`, with the kind as its name. Options after a question mark belong to the
source, except ``classes``, ``background`` and ``white``, which every source has.
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
from sfm.pipeline.sources.class_labels import ClassList, get_display_names, read_class_list
from sfm.pipeline.sources.class_subsets import select_classes
from sfm.pipeline.sources.folder import open_folder_source
from sfm.pipeline.sources.idx import open_builtin_source, open_idx_source
from sfm.pipeline.sources.limits import require_storable_classes
from sfm.pipeline.sources.parquet import open_parquet_source
from sfm.pipeline.sources.sample import Sample
from sfm.pipeline.sources.source import Shard, Source, Split
from sfm.pipeline.sources.spec_options import format_options, parse_options
from sfm.pipeline.sources.torchvision_datasets import open_torchvision_source
from sfm.pipeline.sources.unicode_class_ids import normalize_class_ids
from sfm.pipeline.sources.validation import require_distillable_classes
from sfm.pipeline.sources.wds import open_wds_source
from sfm.stats_store.class_lists import find_class, with_ids
from sfm.stats_store.names import name_from

__all__ = ["KINDS", "PLUGINS", "Sample", "Shard", "Source", "Split", "open_source"]

SOURCE_KINDS: dict[str, Callable[[str], Source]] = {
    "folder": open_folder_source,
    "wds": open_wds_source,
    "parquet": open_parquet_source,
    "torchvision": open_torchvision_source,
    "idx": open_idx_source,
    "builtin": open_builtin_source,
}

PLUGIN_GROUP = "sfm.sources"

RENDERING_PARSERS: dict[str, Callable[[str], Any]] = {"background": parse_background, "white": parse_white}
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
    plugins = {plugin.name: plugin for plugin in entry_points(group=PLUGIN_GROUP)}
    if not colon or (kind not in SOURCE_KINDS and kind not in plugins):
        kinds = [*SOURCE_KINDS, *plugins]
        close = difflib.get_close_matches(kind, kinds)
        hint = (
            f"did you mean {close[0]}:{rest or 'PATH'}?"
            if close
            else f"write KIND:PLACE, where KIND is one of {', '.join(kinds)}"
        )
        raise InputError(f"unknown dataset {spec!r}: {hint}")
    place, options = parse_options(rest)
    chosen = read_class_list(options.pop("classes")) if "classes" in options else None
    given = pop_rendering_options(spec, options)
    rest = format_options(place, options)
    source = SOURCE_KINDS[kind](rest) if kind in SOURCE_KINDS else plugins[kind].load()(rest)
    if held_out and not source.test.shards:
        why = source.inventory.no_held_out or f"{spec} has no held-out split"
        raise InputError(f"{why}; or hold out a tenth of the training images: --hold-out 0.1")
    if source.class_ids is not None:
        require_storable_classes(source.class_ids, source.class_names, source.spec)
    source = normalize_class_ids(source)
    if chosen is not None:
        source = replace(select_listed_classes(source, chosen), spec=spec)
    if given:
        source = replace(source, spec=spec, rendering=replace(source.rendering, **given))
    # A plug-in's own name, or a class list's, is checked like one that a user gives.
    source = replace(source, name=name_from(source.name))
    ids, labels = source.class_ids, source.labels
    if ids is not None and labels is not None:
        counts = {
            name: np.bincount(own, minlength=len(ids))
            for name, own in labels.items()
            if source.splits[name].shards
        }
        require_distillable_classes(source.spec, ids, counts)
    return source


def pop_rendering_options(spec: str, options: dict[str, str]) -> dict[str, Any]:
    """Take what is said about `sfm.backbones.rendering.Rendering` out of the options of a spec.

    Raises
    ------
    InputError
        If a background is no colour, or a white no value.
    """
    given: dict[str, Any] = {}
    for name, parse in RENDERING_PARSERS.items():
        try:
            given |= {name: parse(options.pop(name))} if name in options else {}
        except ValueError as error:
            raise InputError(f"{spec}: {error}") from error
    return given


def select_listed_classes(source: Source, chosen: ClassList) -> Source:
    """Return the part of a source that is of some classes, under a name of its own.

    Raises
    ------
    InputError
        If the source is known not to have one of them.
    """
    own = source.class_ids or ()
    chosen = with_ids(chosen, [find_class(class_id, own) or class_id for class_id in chosen.ids])
    names = dict(zip(chosen.ids, get_display_names(chosen.ids), strict=True))
    if source.class_ids is not None and source.class_names is not None:
        names |= dict(zip(source.class_ids, source.class_names, strict=True))
    names |= chosen.names
    part = select_classes(source, chosen.ids, [names[class_id] for class_id in chosen.ids])
    is_file = expand_home(chosen.origin).is_file()
    return replace(part, name=f"{source.name}-{Path(chosen.origin).stem}" if is_file else chosen.origin)
