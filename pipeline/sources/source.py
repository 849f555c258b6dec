"""What a source of labelled images is."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.errors import InputError


@dataclass(frozen=True)
class Split:
    """The samples of one split, in the order in which the source reads best.

    Attributes
    ----------
    labels : ndarray of int32, shape (n,)
        Index of each sample's class in ``Source.class_ids``.
    read : callable
        Returns the encoded bytes of sample ``i``; may be called from several threads.
    where : callable
        Names sample ``i`` for a person, e.g. its path.
    listing : str
        Digest (hexadecimal) of what can be seen of the samples without reading them: names, sizes, times.
    """

    labels: npt.NDArray[np.int32]
    read: Callable[[int], bytes]
    where: Callable[[int], str]
    listing: str


@dataclass(frozen=True)
class Source:
    """A labelled image dataset with a training and a held-out split.

    Attributes
    ----------
    name : str
        Default name of the dataset in a store.
    spec : str
        What the user wrote.
    class_ids : list of str
        Sorted; they identify classes across datasets (folder names, WordNet ids, label numbers).
    class_names : list of str
        What people call the classes, in the same order; may repeat.
    train, test : Split
    decode : callable
        Turns a sample's encoded bytes into an image, any mode; raises if it cannot.
    """

    name: str
    spec: str
    class_ids: list[str]
    class_names: list[str]
    train: Split
    test: Split
    decode: Callable[[bytes], Image.Image]
    licence: str = field(default="unknown")

    @property
    def splits(self) -> dict[str, Split]:
        """The two splits, by name."""
        return {"train": self.train, "test": self.test}


def require_usable(source: Source) -> None:
    """Refuse a source that cannot be distilled.

    Raises
    ------
    InputError
        If there are fewer than two classes, or a class has no sample in a split; names it.
    """
    if len(source.class_ids) < 2:
        found = source.class_ids[0] if source.class_ids else "none"
        raise InputError(
            f"{source.spec} has fewer than two classes (found: {found}); the flow of a class points to the "
            f"others, so at least two are needed"
        )
    for split_name, split in source.splits.items():
        counts = np.bincount(split.labels, minlength=len(source.class_ids))
        empty = [source.class_ids[c] for c in np.flatnonzero(counts == 0)]
        if empty:
            raise InputError(
                f"{source.spec} has no {split_name} images in class {', '.join(empty[:5])}"
                f"{' and others' if len(empty) > 5 else ''}; remove the class or add images"
            )


def of_classes(source: Source, keep: npt.NDArray[np.bool_]) -> Source:
    """Return a source without some of its classes.

    Parameters
    ----------
    keep : ndarray of bool, shape (C,)
        Which classes stay.
    """
    index = np.cumsum(keep, dtype=np.int32) - 1
    ids = [class_id for class_id, kept in zip(source.class_ids, keep, strict=True) if kept]

    def part(split: Split) -> Split:
        rows = np.flatnonzero(keep[split.labels])
        return Split(
            labels=index[split.labels[rows]],
            read=lambda i: split.read(int(rows[i])),
            where=lambda i: split.where(int(rows[i])),
            listing=digest_of(split.listing, "\n".join(ids)),
        )

    return replace(
        source,
        class_ids=ids,
        class_names=[name for name, kept in zip(source.class_names, keep, strict=True) if kept],
        train=part(source.train),
        test=part(source.test),
    )


def with_min_count(source: Source, least: int, drop: bool) -> Source:
    """Return a source all of whose classes have at least so many training images.

    Raises
    ------
    InputError
        If some class has fewer and classes are not to be dropped, or fewer than two would be left.
    """
    counts = np.bincount(source.train.labels, minlength=len(source.class_ids))
    small = [f"{source.class_ids[c]} ({counts[c]})" for c in np.flatnonzero(counts < least)]
    if not small:
        return source
    if not drop:
        raise InputError(
            f"{source.spec} has classes with fewer than {least} training images: {', '.join(small[:5])}"
            f"{' and others' if len(small) > 5 else ''}; leave them out with --small-classes drop"
        )
    left = of_classes(source, counts >= least)
    require_usable(left)
    return left


def limited(split: Split, most: int | None) -> npt.NDArray[np.int64]:
    """Return the indices of the first `most` samples of every class, in the split's own order."""
    if most is None:
        return np.arange(len(split.labels))
    order = np.argsort(split.labels, kind="stable")
    counts = np.bincount(split.labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.arange(len(order)) - starts
    return np.sort(order[rank < most])


def digest_of(*parts: str | bytes) -> str:
    """Return the SHA-256 (hexadecimal) of parts, each framed by its length."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()
