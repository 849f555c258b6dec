"""Open the entries of a store, and the backbones, that a run matches its images to."""

from collections.abc import Sequence

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.spec import parse_spec
from sfm.distill.config import DistillConfig
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.cards import Summary
from sfm.stats_store.dataset_names import PinnedName
from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
from sfm.stats_store.entry_selection import (
    NotExtractedError,
    describe_entries,
    describe_entry,
    open_entry_of_backbone,
    select_model_summaries_of_one_size,
)
from sfm.stats_store.extract_command import format_extract_command
from sfm.stats_store.store import Entry, Store, open_store


def open_entry_and_backbone(
    config: DistillConfig, progress: ProgressCallback = no_progress
) -> tuple[Entry, Backbone]:
    """Open the store's entry and the backbone that a config of one backbone names.

    Raises
    ------
    InputError
        If the store holds no such entry, several fit, or the backbone is not the one it was extracted with;
        or the config names several backbones.
    """
    if len(config.backbone) > 1:
        raise InputError("the config names several backbones: call open_entries_and_backbones")
    entries, backbones = open_entries_and_backbones(config, progress)
    return entries[0], backbones[0]


def open_entries_and_backbones(
    config: DistillConfig, progress: ProgressCallback = no_progress
) -> tuple[list[Entry], list[Backbone]]:
    """Open the store's entries and the backbones that a config names, in its order.

    A digest in the name of the dataset pins the first backbone's entry; those of the others are of the same
    images and the same role.

    Raises
    ------
    InputError
        If the store lacks an entry, several fit, or a backbone is not the one it was extracted with; or the
        entries do not fit together, see :func:`require_compatible_entries_and_backbones`.
    """
    store = open_store(config.store)
    summaries = list_visible_and_pinned_summaries(store, config.dataset)
    entries: list[Entry] = []
    backbones: list[Backbone] = []
    for spec, image_size in zip(config.backbone, config.image_size_of_each_backbone, strict=True):
        if entries:
            candidates = find_candidate_summaries_of_same_data(
                store, summaries, entries[0].summary, spec, image_size
            )
        else:
            candidates = find_candidate_summaries(store, summaries, config.dataset, spec, image_size)
        backbone = load_backbone(
            spec,
            image_size=candidates[0].image_size,
            device=config.device,
            fold_norms=config.execution != "eager",
            progress=progress,
        )
        entries.append(open_entry_of_backbone(store, candidates, backbone.card))
        backbones.append(backbone)
        require_compatible_entries_and_backbones(entries, backbones)
    return entries, backbones


def find_candidate_summaries(
    store: Store, summaries: Sequence[Summary], dataset: PinnedName, spec: str, image_size: int | None
) -> list[Summary]:
    """Return the entries of a dataset through the model of a spec, all of one image size.

    Raises
    ------
    InputError
        If there is none, with the command that adds it; or they are of several sizes.
    """
    model = parse_spec(spec).model
    try:
        return select_model_summaries_of_one_size(
            summaries, dataset=dataset, model=model, image_size=image_size
        )
    except NotExtractedError as error:
        line = format_extract_command(store, error.stored_entries_of_dataset[0], spec, image_size)
        raise InputError(f"{error}; to add it: {line}") from None


def find_candidate_summaries_of_same_data(
    store: Store, summaries: Sequence[Summary], first_summary: Summary, spec: str, image_size: int | None
) -> list[Summary]:
    """Return the entries through the model of a spec that are of the images and the role of another entry.

    Of several, those that were extracted with the same options are returned.

    Raises
    ------
    InputError
        If there is none, or they are of several sizes.
    """
    dataset = (
        first_summary.dataset
        if first_summary.role == "full"
        else f"{first_summary.dataset}@{first_summary.role}"
    )
    candidates = find_candidate_summaries(store, summaries, dataset, spec, image_size)
    same_data = [each for each in candidates if each.fingerprint == first_summary.fingerprint]
    if not same_data:
        raise InputError(
            f"the store holds no entry through {spec} of the images of {describe_entry(first_summary)}, only "
            f"{describe_entries(candidates)}: extract both backbones from the same data"
        )
    return [each for each in same_data if each.options == first_summary.options] or same_data


def require_compatible_entries_and_backbones(entries: Sequence[Entry], backbones: Sequence[Backbone]) -> None:
    """Refuse entries that one set of images cannot be matched to together.

    Raises
    ------
    InputError
        If they are not one per backbone, an entry was extracted with another backbone, two backbones are the
        same, or entries are of different images, classes or roles.
    """
    if len(entries) != len(backbones) or not entries:
        raise InputError(f"{len(entries)} entries and {len(backbones)} backbones: give one entry for each")
    first = entries[0]
    hashes: set[str] = set()
    for entry, backbone in zip(entries, backbones, strict=True):
        if backbone.card.hash != entry.summary.backbone_hash:
            raise InputError(
                f"the entry of {entry.dataset.name} was extracted with another backbone than this "
                f"{backbone.card.spec}: load {entry.summary.backbone} at {entry.summary.image_size} px, "
                "with the same weights"
            )
        if backbone.card.hash in hashes:
            raise InputError(
                f"{backbone.card.spec} at {entry.summary.image_size} px is given twice: give every backbone "
                "once"
            )
        hashes.add(backbone.card.hash)
        for what, own, expected in (
            ("role", entry.summary.role, first.summary.role),
            ("images", entry.summary.fingerprint, first.summary.fingerprint),
            ("classes", entry.dataset.class_ids, first.dataset.class_ids),
        ):
            if own != expected:
                raise InputError(
                    f"the entries {describe_entry(first.summary)} and {describe_entry(entry.summary)} differ "
                    f"in their {what}: match backbones by entries of the same data"
                )
