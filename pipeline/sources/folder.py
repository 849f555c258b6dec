"""``folder:PATH``: one folder per class under ``train/`` and under ``test/``, ``val/`` or the like."""

from collections import Counter
from pathlib import Path

import numpy as np

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.class_labels import get_wordnet_names_or_ids
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.file_tree import (
    count_files_below,
    is_dangling_link,
    list_sorted_entries,
    walk_relative_paths_and_entries,
)
from sfm.pipeline.sources.folder_layout import (
    FolderLayout,
    explain_missing_held_out,
    find_folder_layout,
    is_image_entry,
    list_class_folder_names,
)
from sfm.pipeline.sources.inventory import (
    HIDDEN_KIND,
    IMAGE_EXTENSIONS,
    Inventory,
    format_counts_by_kind,
    get_dotless_lowercase_extension,
    get_unused_kind_from_extension,
)
from sfm.pipeline.sources.source import NO_SAMPLES, Source, Split, compute_digest, make_file_split
from sfm.pipeline.sources.spec_options import require_known_options, split_location_and_options
from sfm.stats_store.class_lists import normalize_class_id
from sfm.stats_store.dataset_names import make_dataset_name_from_folder

LOOSE_IMAGES_KIND = "images outside of class folders"


def open_folder_source(place_with_options: str) -> Source:
    """Open a dataset of class folders.

    Parameters
    ----------
    place_with_options : str
        Path of the folder that holds ``train/`` and ``test/`` or ``val/``; ``?train=NAME`` and ``?test=NAME``
        choose folders of other names. Without splits, path of the folder of class folders.

    Raises
    ------
    InputError
        If a folder is missing, or the splits are ambiguous.
    """
    spec = f"folder:{place_with_options}"
    path, options = split_location_and_options(place_with_options)
    require_known_options(spec, options, ("train", "test"))
    root = expand_home(path)
    if not root.is_dir():
        raise InputError(f"no dataset at {spec}: {root} is not a folder")
    layout = find_folder_layout(spec, root, options.get("train"), options.get("test"))
    unused = count_files_outside_classes_by_kind(root, layout)
    splits = [layout.train_folder, *([layout.held_out_folder] if layout.held_out_folder else [])]
    ids = sorted({class_id for split in splits for class_id in list_class_folder_names(split)})
    return Source(
        name=make_dataset_name_from_folder(root),
        spec=spec,
        class_ids=ids,
        class_names=get_wordnet_names_or_ids([normalize_class_id(class_id) for class_id in ids]),
        train=make_folder_split(layout.train_folder, ids, unused),
        test=make_folder_split(layout.held_out_folder, ids, unused) if layout.held_out_folder else NO_SAMPLES,
        decode=decode_image,
        inventory=Inventory(dict(unused), layout.notes, explain_missing_held_out(spec, root, layout)),
    )


def count_files_outside_classes_by_kind(root: Path, layout: FolderLayout) -> Counter[str]:
    """Return the number of files beside the class folders, by kind and by the folder that holds them."""
    unused = Counter({f"in {folder.name}/": count_files_below(folder) for folder in layout.unused_folders})
    splits = (layout.train_folder, layout.held_out_folder)
    for folder in dict.fromkeys((root, *splits)):
        if folder is None:
            continue
        for entry in list_sorted_entries(folder):
            if entry.name[0] == ".":
                unused[HIDDEN_KIND] += 1
            elif is_dangling_link(entry) or not entry.is_dir():
                is_loose_image = (
                    folder in splits and get_dotless_lowercase_extension(entry.name) in IMAGE_EXTENSIONS
                )
                unused[
                    LOOSE_IMAGES_KIND if is_loose_image else get_unused_kind_from_extension(entry.name)
                ] += 1
    return +unused


def make_folder_split(split_folder: Path, class_ids: list[str], unused_by_kind: Counter[str]) -> Split:
    """Return the split of the images in the class folders and below them, by class and name.

    Parameters
    ----------
    unused_by_kind : Counter
        Counts the files that are not images, by kind.

    Raises
    ------
    InputError
        If a folder cannot be read, a link is dangling, or a class holds files but no image.
    """
    names: list[str] = []
    labels: list[int] = []
    file_states: list[str] = []
    for label, class_id in enumerate(class_ids):
        if not (split_folder / class_id).is_dir():
            continue
        first, others = len(names), Counter[str]()
        for path, entry in walk_relative_paths_and_entries(str(split_folder / class_id), others):
            if not is_image_entry(entry):
                others[get_unused_kind_from_extension(entry.name)] += 1
                continue
            status = entry.stat()
            names.append(f"{class_id}/{path}")
            labels.append(label)
            file_states.append(f"{names[-1]} {status.st_size} {status.st_mtime_ns}")
        if len(names) == first and others:
            raise InputError(
                f"{split_folder / class_id} holds no image, only {format_counts_by_kind(others)}; remove the "
                f"folder or add images"
            )
        unused_by_kind.update(others)

    return make_file_split(
        labels=np.array(labels, dtype=np.int32),
        class_ids=class_ids,
        path=lambda i: f"{split_folder}/{names[i]}",
        listing_digest=compute_digest(str(split_folder.resolve()), "\n".join(file_states)),
    )
