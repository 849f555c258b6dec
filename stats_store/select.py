"""Find the entry that a name, a backbone and a size mean, or say what there is."""

import difflib
from collections.abc import Sequence

from sfm.backbones.card import BackboneCard, describe_backbone_differences
from sfm.errors import InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.names import split_pin
from sfm.stats_store.store import Entry, Store


class NotExtractedError(InputError):
    """A dataset is in the store, but not through this backbone at this size.

    Attributes
    ----------
    others : list of Summary
        Its entries that there are.
    """

    def __init__(self, message: str, others: Sequence[Summary]) -> None:
        super().__init__(message)
        self.others = list(others)


def described(summary: Summary) -> str:
    """Return an entry in a few words, pinned: what a user can type to get exactly this one."""
    role = "" if summary.role == "full" else f" ({summary.role})"
    return (
        f"{summary.dataset}@{summary.entry_digest[:12]} {summary.backbone} {summary.image_size}px "
        f"{summary.train_samples} images{role}"
    )


def listed(summaries: Sequence[Summary], most: int = 8) -> str:
    """Return entries on one line."""
    shown = "; ".join(described(s) for s in summaries[:most])
    rest = f"; and {len(summaries) - most} more" if len(summaries) > most else ""
    return shown + rest if summaries else "nothing"


def named(summaries: Sequence[Summary], dataset: str) -> list[Summary]:
    """Return the entries that ``NAME``, ``NAME@DIGEST`` or ``NAME@tuning`` means.

    Without a digest, entries of role ``tuning`` are left out; ``@tuning`` means them alone.

    Raises
    ------
    InputError
        If there is none; names close matches or what the store holds.
    """
    name, pin = split_pin(dataset, {s.dataset for s in summaries})
    of_name = [s for s in summaries if s.dataset == name]
    if not of_name:
        close = difflib.get_close_matches(name, {s.dataset for s in summaries})
        hint = f"did you mean {' or '.join(close)}?" if close else f"the store holds {listed(summaries)}"
        raise InputError(f"no dataset {name!r} in the store: {hint}")
    if pin == "tuning":
        found = [s for s in of_name if s.role == "tuning"]
    elif pin:
        found = [s for s in of_name if s.entry_digest.startswith(pin)]
    else:
        found = [s for s in of_name if s.role == "full"]
    if not found:
        raise InputError(f"no entry {dataset!r} in the store: it holds {listed(of_name)}")
    return found


def narrow(
    summaries: Sequence[Summary],
    *,
    dataset: str,
    model: str,
    image_size: int | None = None,
) -> list[Summary]:
    """Return the entries of a dataset through an architecture, all of one image size.

    Parameters
    ----------
    summaries : sequence of Summary
        What the store holds.
    dataset : str
        ``NAME``, ``NAME@DIGEST`` (any unambiguous beginning of an entry digest) or ``NAME@tuning``.
    model : str
        timm's name of the architecture.
    image_size : int, optional
        Input size in pixels; may be left out where the store holds only one.

    Raises
    ------
    InputError
        If several sizes fit; lists them.
    NotExtractedError
        If nothing fits; lists what the store does hold.
    """
    of_dataset = named(summaries, dataset)
    fitting = [s for s in of_dataset if s.model == model]
    if not fitting:
        raise NotExtractedError(
            f"no entry of {dataset} through {model} in the store: it holds {listed(of_dataset)}", of_dataset
        )
    if image_size is not None:
        sized = [s for s in fitting if s.image_size == image_size]
        if not sized:
            raise NotExtractedError(
                f"no entry of {dataset} through {model} at {image_size} px: the store holds "
                f"{listed(fitting)}",
                fitting,
            )
        return sized
    if len({s.image_size for s in fitting}) > 1:
        raise InputError(
            f"{dataset} through {model} is stored at several sizes, choose one with --image-size: "
            f"{listed(fitting)}"
        )
    return fitting


def match(store: Store, candidates: Sequence[Summary], backbone: BackboneCard) -> Entry:
    """Open the one candidate that was extracted with exactly this backbone.

    Raises
    ------
    InputError
        If none was (says whether architecture, weights or preprocessing differ), or several were (lists
        the variants, each with the digest that pins it).
    """
    same = [s for s in candidates if s.backbone_hash == backbone.hash]
    if not same:
        other = store.open(candidates[0])
        parts = " and ".join(describe_backbone_differences(other.backbone, backbone))
        raise InputError(
            f"the backbone {backbone.spec} ({backbone.hash[:12]}) is not the one the entry "
            f"{described(other.summary)} was extracted with ({other.summary.backbone_hash[:12]}): "
            f"it differs in {parts}"
        )
    if len(same) > 1:
        raise InputError(f"several entries fit, pin one as NAME@DIGEST: {listed(same)}")
    return store.open(same[0])


def only(
    summaries: Sequence[Summary],
    *,
    dataset: str,
    backbone: str | None = None,
    image_size: int | None = None,
) -> Summary:
    """Return the one entry that the words mean; no backbone is loaded, the spec must be the stored one.

    Raises
    ------
    InputError
        If none or several fit; lists them.
    """
    of_dataset = named(summaries, dataset)
    fitting = [
        s
        for s in of_dataset
        if (backbone is None or s.backbone == backbone) and (image_size is None or s.image_size == image_size)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"several entries fit, name --backbone or pin one as NAME@DIGEST: {listed(fitting)}")
    raise InputError(f"no such entry of {dataset}: the store holds {listed(of_dataset)}")


def every(
    summaries: Sequence[Summary],
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
) -> list[Summary]:
    """Return all entries that the words mean, of any role; all there are if no word is given.

    Raises
    ------
    InputError
        If a word is given and nothing fits.
    """
    if dataset is None:
        of_dataset = list(summaries)
    else:
        # All of that name, whatever their role; or those that a pin means.
        of_dataset = [s for s in summaries if s.dataset == dataset] or named(summaries, dataset)
    fitting = [
        s
        for s in of_dataset
        if (backbone is None or s.backbone == backbone) and (image_size is None or s.image_size == image_size)
    ]
    if fitting or (dataset, backbone, image_size) == (None, None, None):
        return fitting
    raise InputError(f"no entry fits: the store holds {listed(of_dataset)}")
