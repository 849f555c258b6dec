"""Open labelled image datasets: folders, tar shards, tables, torchvision's datasets, idx files, plug-ins.

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
from typing import Any, cast

import numpy as np

from sfm.backbones.rendering import parse_background_colour, parse_white_value
from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.class_labels import ParsedClassList, get_wordnet_names_or_ids, read_class_list
from sfm.pipeline.sources.class_subsets import select_source_classes
from sfm.pipeline.sources.folder import open_folder_source
from sfm.pipeline.sources.idx import open_builtin_source, open_idx_source
from sfm.pipeline.sources.limits import require_class_names_within_limits
from sfm.pipeline.sources.parquet import open_parquet_source
from sfm.pipeline.sources.sample import Sample
from sfm.pipeline.sources.source import Shard, Source, Split
from sfm.pipeline.sources.spec_options import join_location_and_options, split_location_and_options
from sfm.pipeline.sources.torchvision_datasets import open_torchvision_source
from sfm.pipeline.sources.unicode_class_ids import normalize_source_class_ids
from sfm.pipeline.sources.validation import require_distillable_classes
from sfm.pipeline.sources.wds import open_wds_source
from sfm.stats_store.class_lists import find_class_id, replace_class_ids
from sfm.stats_store.dataset_names import make_dataset_name

__all__ = ["PLUGIN_GROUP", "SOURCE_KINDS", "Sample", "Shard", "Source", "Split", "open_source"]

SOURCE_KINDS: dict[str, Callable[[str], Source]] = {
    "folder": open_folder_source,
    "wds": open_wds_source,
    "parquet": open_parquet_source,
    "torchvision": open_torchvision_source,
    "idx": open_idx_source,
    "builtin": open_builtin_source,
}

PLUGIN_GROUP = "sfm.sources"

RENDERING_PARSERS: dict[str, Callable[[str], Any]] = {
    "background": parse_background_colour,
    "white": parse_white_value,
}
"""Parsers of the options that every source has for rendering images."""


def open_source(spec: str, *, require_held_out: bool = True) -> Source:
    """Open the dataset of a spec such as ``folder:PATH``, and check what is known without reading samples.

    Parameters
    ----------
    spec : str
        ``KIND:PLACE?OPTIONS``.
    require_held_out : bool
        Whether it must have a held-out split.

    Raises
    ------
    InputError
        If the kind is unknown, the dataset is missing or has no held-out split, or its classes are known and
        cannot be distilled.
    """
    opener = find_source_opener(spec)
    location, options = split_location_and_options(spec.partition(":")[2])
    class_list = read_class_list(options.pop("classes")) if "classes" in options else None
    rendering_options = pop_and_parse_rendering_options(spec, options)
    source = opener(join_location_and_options(location, options))
    if require_held_out and not source.test.shards:
        reason = source.inventory.no_held_out_reason or f"{spec} has no held-out split"
        raise InputError(f"{reason}; or hold out a tenth of the training images: --hold-out 0.1")
    if source.class_ids is not None:
        require_class_names_within_limits(source.class_ids, source.class_names, source.spec)
    source = normalize_source_class_ids(source)
    if class_list is not None:
        source = replace(select_listed_classes_and_rename_source(source, class_list), spec=spec)
    if rendering_options:
        source = replace(source, spec=spec, rendering=replace(source.rendering, **rendering_options))
    # Names from plug-ins and class lists are checked like those of users.
    source = replace(source, name=make_dataset_name(source.name))
    ids, labels = source.class_ids, source.labels
    if ids is not None and labels is not None:
        counts = {
            split_name: np.bincount(split_labels, minlength=len(ids))
            for split_name, split_labels in labels.items()
            if source.splits[split_name].shards
        }
        require_distillable_classes(source.spec, ids, counts)
    return source


def find_source_opener(spec: str) -> Callable[[str], Source]:
    """Return the function that opens sources of a spec's kind, from this package or a plug-in.

    Raises
    ------
    InputError
        If there is no such kind; suggests the nearest one.
    """
    kind, colon, location = spec.partition(":")
    plugins = {plugin.name: plugin for plugin in entry_points(group=PLUGIN_GROUP)}
    if colon and kind in SOURCE_KINDS:
        return SOURCE_KINDS[kind]
    if colon and kind in plugins:
        return cast("Callable[[str], Source]", plugins[kind].load())
    kinds = [*SOURCE_KINDS, *plugins]
    close = difflib.get_close_matches(kind, kinds)
    if close:
        raise InputError(f"unknown dataset {spec!r}: did you mean {close[0]}:{location or 'PATH'}?")
    raise InputError(f"unknown dataset {spec!r}: write KIND:PLACE, where KIND is one of {', '.join(kinds)}")


def pop_and_parse_rendering_options(spec: str, options: dict[str, str]) -> dict[str, Any]:
    """Remove the options that set fields of `sfm.backbones.rendering.Rendering`, and return their values.

    Raises
    ------
    InputError
        If a background is not a colour, or a white level is not a number.
    """
    values: dict[str, Any] = {}
    for name, parse in RENDERING_PARSERS.items():
        if name in options:
            try:
                values[name] = parse(options.pop(name))
            except ValueError as error:
                raise InputError(f"{spec}: {error}") from error
    return values


def select_listed_classes_and_rename_source(source: Source, class_list: ParsedClassList) -> Source:
    """Return a source of the classes of a list only, named after the list.

    Raises
    ------
    InputError
        If the source lacks one of them.
    """
    own_ids = source.class_ids or ()
    class_list = replace_class_ids(
        class_list, [find_class_id(class_id, own_ids) or class_id for class_id in class_list.class_ids]
    )
    names = dict(zip(class_list.class_ids, get_wordnet_names_or_ids(class_list.class_ids), strict=True))
    if source.class_ids is not None and source.class_names is not None:
        names |= dict(zip(source.class_ids, source.class_names, strict=True))
    names |= class_list.display_names
    subset = select_source_classes(
        source, class_list.class_ids, [names[class_id] for class_id in class_list.class_ids]
    )
    if expand_home(class_list.origin).is_file():
        return replace(subset, name=f"{source.name}-{Path(class_list.origin).stem}")
    return replace(subset, name=class_list.origin)
