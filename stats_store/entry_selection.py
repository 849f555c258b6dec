"""Select entries by dataset name, backbone and image size, or say which ones the store holds."""

import difflib
from collections.abc import Sequence

from sfm.backbones.card import BackboneCard, describe_backbone_differences
from sfm.errors import InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.dataset_names import PinnedName, split_pinned_name
from sfm.stats_store.store import Entry, Store


class NotExtractedError(InputError):
    """The store holds the dataset, but not through the requested backbone at the requested size.

    Attributes
    ----------
    stored_entries_of_dataset : list of Summary
        Entries of the dataset that the store holds.
    """

    def __init__(self, message: str, stored_entries_of_dataset: Sequence[Summary]) -> None:
        super().__init__(message)
        self.stored_entries_of_dataset = list(stored_entries_of_dataset)


def describe_entry(summary: Summary) -> str:
    """Return a short description of an entry, with the pinned name by which a user can request it."""
    role = "" if summary.role == "full" else f" ({summary.role})"
    return (
        f"{summary.dataset}@{summary.entry_digest[:12]} {summary.backbone} {summary.image_size}px "
        f"{summary.train_samples} images{role}"
    )


def describe_entries(summaries: Sequence[Summary], max_entries: int = 8) -> str:
    """Return the descriptions of entries on one line, at most `max_entries` of them."""
    listed = "; ".join(describe_entry(s) for s in summaries[:max_entries])
    omitted = f"; and {len(summaries) - max_entries} more" if len(summaries) > max_entries else ""
    return listed + omitted if summaries else "nothing"


def find_named_summaries_or_raise(summaries: Sequence[Summary], pinned_name: PinnedName) -> list[Summary]:
    """Return the entries that ``NAME``, ``NAME@DIGEST`` or ``NAME@tuning`` names.

    Without a digest, only entries of role ``full`` are returned; with ``@tuning``, those of role ``tuning``.

    Raises
    ------
    InputError
        If there is none; suggests similar names or lists what the store holds.
    """
    name, pin = split_pinned_name(pinned_name, {s.dataset for s in summaries})
    named = [s for s in summaries if s.dataset == name]
    if not named:
        close = difflib.get_close_matches(name, {s.dataset for s in summaries})
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"the store holds {describe_entries(summaries)}"
        )
        raise InputError(f"no dataset {name!r} in the store: {hint}")
    if pin == "tuning":
        selected = [s for s in named if s.role == "tuning"]
    elif pin:
        selected = [s for s in named if s.entry_digest.startswith(pin)]
    else:
        selected = [s for s in named if s.role == "full"]
    if not selected:
        raise InputError(f"no entry {pinned_name!r} in the store: it holds {describe_entries(named)}")
    return selected


def select_model_summaries_of_one_size(
    summaries: Sequence[Summary], *, dataset: PinnedName, model: str, image_size: int | None = None
) -> list[Summary]:
    """Return the entries of a dataset and a model, all of one image size.

    Parameters
    ----------
    summaries : sequence of Summary
        Summaries of the entries in the store.
    dataset : str
        ``NAME``, ``NAME@DIGEST`` (any unambiguous beginning of an entry digest) or ``NAME@tuning``.
    model : str
        timm's name of the architecture.
    image_size : int, optional
        Input size in pixels; may be left out where the store holds only one.

    Raises
    ------
    InputError
        If entries of several sizes match; lists them.
    NotExtractedError
        If none matches; lists the entries of the dataset.
    """
    dataset_summaries = find_named_summaries_or_raise(summaries, dataset)
    matching = [s for s in dataset_summaries if s.model == model]
    if not matching:
        raise NotExtractedError(
            f"no entry of {dataset} through {model} in the store: it holds "
            f"{describe_entries(dataset_summaries)}",
            dataset_summaries,
        )
    if image_size is not None:
        size_summaries = [s for s in matching if s.image_size == image_size]
        if not size_summaries:
            raise NotExtractedError(
                f"no entry of {dataset} through {model} at {image_size} px: the store holds "
                f"{describe_entries(matching)}",
                matching,
            )
        return size_summaries
    if len({s.image_size for s in matching}) > 1:
        raise InputError(
            f"{dataset} through {model} is stored at several sizes, choose one with --image-size: "
            f"{describe_entries(matching)}"
        )
    return matching


def open_entry_of_backbone(store: Store, candidates: Sequence[Summary], backbone: BackboneCard) -> Entry:
    """Open the candidate that was extracted with exactly this backbone, by its hash.

    Raises
    ------
    InputError
        If none was (says whether architecture, weights or preprocessing differ), or several were (lists
        them, each with the digest that pins it).
    """
    backbone_entries = [s for s in candidates if s.backbone_hash == backbone.hash]
    if not backbone_entries:
        other = store.open_entry(candidates[0])
        parts = " and ".join(describe_backbone_differences(other.backbone, backbone))
        raise InputError(
            f"the backbone {backbone.spec} ({backbone.hash[:12]}) is not the one the entry "
            f"{describe_entry(other.summary)} was extracted with ({other.summary.backbone_hash[:12]}): "
            f"it differs in {parts}"
        )
    if len(backbone_entries) > 1:
        raise InputError(f"several entries fit, pin one as NAME@DIGEST: {describe_entries(backbone_entries)}")
    return store.open_entry(backbone_entries[0])


def select_only_summary(
    summaries: Sequence[Summary],
    *,
    dataset: PinnedName,
    backbone_spec: str | None = None,
    image_size: int | None = None,
) -> Summary:
    """Return the only entry of this dataset, backbone spec and image size; no backbone is loaded.

    Raises
    ------
    InputError
        If none or several match; lists them.
    """
    dataset_summaries = find_named_summaries_or_raise(summaries, dataset)
    matching = [
        s
        for s in dataset_summaries
        if (backbone_spec is None or s.backbone == backbone_spec)
        and (image_size is None or s.image_size == image_size)
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(
            f"several entries fit, name --backbone or pin one as NAME@DIGEST: {describe_entries(matching)}"
        )
    raise InputError(f"no such entry of {dataset}: the store holds {describe_entries(dataset_summaries)}")


def filter_summaries_or_raise(
    summaries: Sequence[Summary],
    *,
    dataset: PinnedName | None = None,
    backbone_spec: str | None = None,
    image_size: int | None = None,
) -> list[Summary]:
    """Return all entries of this dataset, backbone spec and image size, of any role; all if none is given.

    Raises
    ------
    InputError
        If none matches and a filter is given.
    """
    if dataset is None:
        dataset_summaries = list(summaries)
    else:
        # All entries of the name, of any role, or those that a pin names.
        dataset_summaries = [s for s in summaries if s.dataset == dataset] or find_named_summaries_or_raise(
            summaries, dataset
        )
    matching = [
        s
        for s in dataset_summaries
        if (backbone_spec is None or s.backbone == backbone_spec)
        and (image_size is None or s.image_size == image_size)
    ]
    if matching or (dataset, backbone_spec, image_size) == (None, None, None):
        return matching
    raise InputError(f"no entry fits: the store holds {describe_entries(dataset_summaries)}")
