r"""What a source of labelled images is, and how to write one.

A source is data: two splits, each a sequence of *shards*, and a function that decodes one sample. A shard is
read in order, by one reader, as often as anyone likes; it is the unit that workers take, that is resumed, and
that a broken run loses at most. There are two kinds of split:

- Labels are known before anything is read (folders, index files, tables with a label column). Every shard
  says its labels. :func:`file_split` makes shards out of samples that are files of their own, and
  :func:`indexed_split` out of any function that reads the i-th sample.
- Labels come with the samples (tar shards). A shard's ``labels`` are None, samples name their class, and the
  classes of the dataset are those found in the pass; ``Source.class_ids`` may be None until then.

A complete source of one's own, usable as ``pairs:PATH`` once an installed package declares the entry point
``pairs = "my_package:pairs_source"`` in the group ``sfm.sources``::

    def pairs_source(text: str) -> Source:
        def split(name: str) -> Split:
            lines = [line.split("\t") for line in Path(text, f"{name}.tsv").read_text().splitlines()]
            return file_split(
                labels=np.array([ids.index(label) for _, label in lines], dtype=np.int32),
                class_ids=ids,
                path=lambda i: f"{text}/{lines[i][0]}",
                listing=digest_of(name, *("\t".join(line) for line in lines)),
            )

        ids = Path(text, "classes.txt").read_text().split()
        return Source("pairs", f"pairs:{text}", ids, ids, split("train"), split("test"), decode_image)
"""

import difflib
import hashlib
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TypeVar, final

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.rendering import Rendering
from sfm.errors import InputError
from sfm.pipeline.sources.inventory import Inventory
from sfm.pipeline.sources.limits import AHEAD_BYTES, IMAGE_BYTES
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.untrusted import OversizeError, read_file

AT_ONCE = 8
"""Files that a reading thread takes at once."""

VANISHED = "{} vanished while the dataset was read; run again"

READERS = 8
"""Files read at a time: what a network disk takes to answer passes while others are decoded."""

OTHER_CLASSES = "images of other classes"

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One labelled image as it is stored.

    Attributes
    ----------
    data : bytes
        Encoded.
    label : str
        Id of its class.
    where : str
        Names it for a person, e.g. its path.
    written : str
        How its label is written, where that is a number; "" where it does not matter.
    fault : str
        Why it was not read, though it is there: it counts as one that cannot be decoded.
    """

    data: bytes
    label: str
    where: str
    written: str = ""
    fault: str = ""

    def read(self) -> "Sample":
        """Return the sample, which is read already."""
        return self


def too_large(size: int | None = None) -> str:
    """Return what is wrong with an image that is not read."""
    return f"{'' if size is None else f'{size:,} bytes: '}more than {IMAGE_BYTES:,} bytes are no image"


@final
@dataclass(frozen=True)
class SampleFile:
    """A labelled image that is a file of its own, not read yet; who decodes it reads it, maybe elsewhere.

    Attributes
    ----------
    where : str
        Its path.
    label : str
        Id of its class.
    """

    where: str
    label: str

    def read(self) -> Sample:
        """Return the sample; a file that is larger than any image is not read, which the sample tells.

        Raises
        ------
        InputError
            If the file cannot be read.
        """
        return self.read_up_to(IMAGE_BYTES) or Sample(b"", self.label, self.where, fault=too_large())

    def read_ahead(self) -> "Sample | SampleFile":
        """Return the sample before it is its turn; a large file as it is, since memory holds many of them."""
        return self.read_up_to(AHEAD_BYTES) or self

    def read_up_to(self, most: int) -> Sample | None:
        """Return the sample, or None if it has more than so many bytes."""
        try:
            return Sample(read_file(Path(self.where), most), self.label, self.where)
        except OversizeError:
            return None
        except FileNotFoundError as error:
            raise InputError(VANISHED.format(self.where)) from error
        except OSError as error:
            raise InputError(f"cannot read {self.where}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Shard:
    """Samples that are read in order.

    Attributes
    ----------
    where : str
        Names it for a person.
    labels : ndarray of int32, shape (n,), or None
        Index of each sample's class in ``Source.class_ids``; None if only reading tells.
    read : callable
        Given positions (ndarray of int64), each above the one before, or None for all, yields those samples,
        or a `SampleFile` for each; raises InputError if they cannot be read. It may be called again, in
        other processes too, and yields the same then; in one process, one shard is read at a time.
    unused : Counter
        What the last reading of all samples passed over, by kind; only where reading tells.
    """

    where: str
    labels: npt.NDArray[np.int32] | None
    read: Callable[[npt.NDArray[np.int64] | None], Iterator[Sample | SampleFile]]
    unused: Counter[str] = field(default_factory=Counter, compare=False)


@dataclass(frozen=True)
class Split:
    """The samples of one split, in the order in which the source reads best.

    Attributes
    ----------
    shards : tuple of Shard
        Either all know their labels, or none does.
    listing : str
        Digest (hexadecimal) of what can be seen of the samples without reading them: names, sizes, times.
    """

    shards: tuple[Shard, ...]
    listing: str

    @property
    def labels(self) -> npt.NDArray[np.int32] | None:
        """Labels of all samples, shape (n,); None if only reading tells."""
        known = [shard.labels for shard in self.shards if shard.labels is not None]
        if len(known) < len(self.shards):
            return None
        return np.concatenate([*known, np.zeros(0, dtype=np.int32)])

    def read(self, rows: npt.NDArray[np.int64], sizes: Sequence[int] | None = None) -> Iterator[Sample]:
        """Yield samples, as :meth:`listed` does, but all of them read.

        Raises
        ------
        InputError
            If a file cannot be read.
        """
        return loaded(self.listed(rows, sizes))

    def listed(
        self, rows: npt.NDArray[np.int64], sizes: Sequence[int] | None = None
    ) -> Iterator[Sample | SampleFile]:
        """Yield samples, given by ascending positions in the split; files of their own are not read.

        Parameters
        ----------
        rows : ndarray of int64
        sizes : sequence of int, optional
            Samples per shard; needed where labels are not known.
        """
        if sizes is None:
            sizes = [0 if shard.labels is None else len(shard.labels) for shard in self.shards]
        ends = np.cumsum([0, *sizes])
        cuts = np.searchsorted(rows, ends)
        for number, shard in enumerate(self.shards):
            own = rows[cuts[number] : cuts[number + 1]]
            if len(own):
                yield from shard.read(own - ends[number])


NO_SAMPLES = Split((), "")
"""The held-out split of a dataset that has none."""


@dataclass(frozen=True)
class Source:
    """A labelled image dataset with a training and a held-out split.

    Attributes
    ----------
    name : str
        Default name of the dataset in a store.
    spec : str
        What the user wrote.
    class_ids : list of str or None
        Sorted; they identify classes across datasets (folder names, WordNet ids, label numbers). None: those
        that are found in the pass.
    class_names : list of str or None
        What people call the classes, in the same order; may repeat. None: the ids.
    train, test : Split
        ``NO_SAMPLES`` where nothing is held out.
    decode : callable
        Turns a sample's encoded bytes into an image, any mode; raises OSError or ValueError if it cannot. For
        a GPU it is pickled (by cloudpickle, with what it holds) and called in other processes.
    licence : str
    rendering : Rendering
        How decoded images become opaque 8-bit pixels; what the options ``background`` and ``white`` say.
    inventory : Inventory
        What else lies there.
    """

    name: str
    spec: str
    class_ids: list[str] | None
    class_names: list[str] | None
    train: Split
    test: Split
    decode: Callable[[bytes], Image.Image]
    licence: str = field(default="unknown")
    rendering: Rendering = field(default=Rendering())
    inventory: Inventory = field(default_factory=Inventory)

    @property
    def splits(self) -> dict[str, Split]:
        """The two splits, by name."""
        return {"train": self.train, "test": self.test}

    @property
    def labels(self) -> dict[str, npt.NDArray[np.int32]] | None:
        """Labels of all samples, by split; None if only reading tells."""
        train, test = self.train.labels, self.test.labels
        return None if train is None or test is None else {"train": train, "test": test}


def file_split(
    labels: npt.NDArray[np.int32], class_ids: Sequence[str], path: Callable[[int], str], listing: str
) -> Split:
    """Make a split of samples that are files of their own: shards of ``BLOCK_ROWS`` of them.

    Files are read several at a time, ahead of who decodes them; for a GPU, in the processes that decode.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
        Index of each sample's class in `class_ids`.
    path : callable
        Returns the path of sample ``i``.
    listing : str
        See `Split`.
    """

    def samples(rows: list[int]) -> Iterator[SampleFile]:
        return (SampleFile(path(i), class_ids[labels[i]]) for i in rows)

    return split_of(labels, samples, path, listing)


def indexed_split(
    labels: npt.NDArray[np.int32],
    class_ids: Sequence[str],
    read: Callable[[int], bytes],
    where: Callable[[int], str],
    listing: str,
) -> Split:
    """Make a split of samples that can be read one by one, in any order: shards of ``BLOCK_ROWS`` samples.

    They are read one after the other, in one thread.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
        Index of each sample's class in `class_ids`.
    read : callable
        Returns the encoded bytes of sample ``i``.
    where : callable
        Names sample ``i`` for a person.
    listing : str
        See `Split`.
    """

    def samples(rows: list[int]) -> Iterator[Sample]:
        return (Sample(read(i), class_ids[labels[i]], where(i)) for i in rows)

    return split_of(labels, samples, where, listing)


def split_of(
    labels: npt.NDArray[np.int32],
    samples: Callable[[list[int]], Iterator[Sample | SampleFile]],
    where: Callable[[int], str],
    listing: str,
) -> Split:
    """Make a split of samples whose labels are known: shards of ``BLOCK_ROWS`` samples.

    Parameters
    ----------
    samples : callable
        Yields those at some positions, in their order.
    """

    def shard(start: int) -> Shard:
        own = labels[start : start + BLOCK_ROWS]

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
            rows = (np.arange(len(own)) if positions is None else positions) + start
            return samples(rows.tolist())

        last = start + len(own) - 1
        return Shard(f"{where(start)} to {where(last)}", own, read)

    return Split(tuple(shard(start) for start in range(0, len(labels), BLOCK_ROWS)), listing)


def loaded(samples: Iterable[Sample | SampleFile], readers: int = READERS) -> Iterator[Sample]:
    """Yield samples, all of them read: files ahead of who takes them.

    A thread reads a few at a time: each change of threads takes a core from those that compute.

    Parameters
    ----------
    samples : iterable of Sample or SampleFile
    readers : int
        Threads that read, if the first sample is a file.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    coming = iter(samples)
    first = next(coming, None)
    if first is None:
        return
    coming = chain([first], coming)
    if isinstance(first, Sample):
        yield from (sample.read() for sample in coming)
        return
    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        waiting: deque[Future[list[Sample | SampleFile]]] = deque()
        try:
            while few := list(islice(coming, AT_ONCE)):
                waiting.append(pool.submit(read_ahead, few))
                if len(waiting) > readers:
                    yield from (sample.read() for sample in waiting.popleft().result())
            while waiting:
                yield from (sample.read() for sample in waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()


def read_ahead(samples: Sequence[Sample | SampleFile]) -> list[Sample | SampleFile]:
    """Read samples, but for large files."""
    return [sample.read_ahead() if isinstance(sample, SampleFile) else sample for sample in samples]


def require_usable(
    spec: str, class_ids: Sequence[str], counts: dict[str, npt.NDArray[np.int64]], when: str = ""
) -> None:
    """Refuse classes that cannot be distilled.

    Parameters
    ----------
    spec : str
        What the user wrote.
    counts : dict of str to ndarray of int64, shape (C,)
        Samples per class, by split.
    when : str
        Said after "no images in class ...", e.g. " once unreadable ones are skipped".

    Raises
    ------
    InputError
        If there are fewer than two classes, two are told apart by writing alone, or one has no sample in a
        split; names it.
    """
    if len(class_ids) < 2:
        found = class_ids[0] if class_ids else "none"
        raise InputError(
            f"{spec} has fewer than two classes (found: {found}); the flow of a class points to the "
            f"others, so at least two are needed"
        )
    alike: dict[str, str] = {}
    for class_id in class_ids:
        other = alike.setdefault(unicodedata.normalize("NFKC", class_id).casefold().strip(), class_id)
        if other != class_id:
            raise InputError(
                f"{spec} has classes {other!r} and {class_id!r}, the same but for how they are written: "
                f"make them one class, or give them names that differ"
            )
    for split_name, count in counts.items():
        empty = [class_ids[c] for c in np.flatnonzero(count == 0).tolist()]
        if empty:
            raise InputError(
                f"{spec} has no {split_name} images in class {some(empty)}{when}; remove the class or add "
                f"images, or leave it out with ?classes=LIST"
            )


def of_classes(source: Source, class_ids: Sequence[str], class_names: Sequence[str] | None = None) -> Source:
    """Return a source of some of its classes only; samples of others are not decoded.

    Where labels are known, nothing is read of other classes; elsewhere their samples are read and dropped.

    Parameters
    ----------
    class_ids : sequence of str
        In any order.
    class_names : sequence of str, optional
        What people call them, in the order of `class_ids`; by default as in the source.

    Raises
    ------
    InputError
        If the source is known not to have one of them, or one is given twice.
    """
    ids = sorted(class_ids)
    twice = sorted({a for a, b in pairwise(ids) if a == b})
    if twice:
        raise InputError(f"the class list for {source.spec} names {some(twice)} twice")
    if class_names is not None:
        name_of = dict(zip(class_ids, class_names, strict=True))
    else:
        name_of = dict(zip(source.class_ids or (), source.class_names or source.class_ids or (), strict=True))
    if source.class_ids is not None:
        absent = [class_id for class_id in ids if class_id not in set(source.class_ids)]
        if absent:
            close = difflib.get_close_matches(absent[0], source.class_ids, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise InputError(f"{source.spec} has no class {some(absent)}{hint}")
    wanted, place = "\n".join(ids), {class_id: c for c, class_id in enumerate(ids)}
    others = 0

    def part(split: Split) -> Split:
        labels, listing = split.labels, digest_of(split.listing, wanted)
        if labels is None:
            return Split(tuple(filtered(shard, place.keys()) for shard in split.shards), listing)
        assert source.class_ids is not None
        index = np.array([place.get(class_id, -1) for class_id in source.class_ids], dtype=np.int32)
        rows = np.flatnonzero(index[labels] >= 0)
        nonlocal others
        others += len(labels) - len(rows)
        return recut(split, rows, index[labels[rows]], listing)

    train, test = part(source.train), part(source.test) if source.test.shards else source.test
    return replace(
        source,
        class_ids=ids,
        class_names=[name_of.get(class_id, class_id) for class_id in ids],
        train=train,
        test=test,
        inventory=source.inventory.with_unused(OTHER_CLASSES, others),
    )


def filtered(shard: Shard, class_ids: Collection[str]) -> Shard:
    """Return a shard that drops samples of other classes while they are read; positions count the rest."""

    def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
        shard.unused[OTHER_CLASSES] = 0
        kept = (sample for sample in shard.read(None) if keep(sample))
        return kept if positions is None else at(kept, positions)

    def keep(sample: Sample | SampleFile) -> bool:
        if sample.label in class_ids:
            return True
        shard.unused[OTHER_CLASSES] += 1
        return False

    return replace(shard, read=read)


def at(samples: Iterator[T], positions: npt.NDArray[np.int64]) -> Iterator[T]:
    """Yield the samples at ascending positions of a stream, and read no further than the last."""
    wanted = iter(positions.tolist())
    target = next(wanted, None)
    for position, sample in enumerate(samples):
        if position == target:
            yield sample
            target = next(wanted, None)
        if target is None:
            return


def recut(split: Split, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], listing: str) -> Split:
    """Return a split of some samples of another whose labels are known, in shards of ``BLOCK_ROWS``."""

    def shard(start: int) -> Shard:
        own = rows[start : start + BLOCK_ROWS]
        return Shard(
            f"samples {own[0]} to {own[-1]} of {split.shards[0].where} …",
            labels[start : start + BLOCK_ROWS],
            lambda positions: split.listed(own if positions is None else own[positions]),
        )

    return Split(tuple(shard(start) for start in range(0, len(rows), BLOCK_ROWS)), listing)


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first few names, and whether there are more."""
    return ", ".join(names[:most]) + (" and others" if len(names) > most else "")


def digest_of(*parts: str | bytes) -> str:
    """Return the SHA-256 (hexadecimal) of parts, each framed by its length."""
    whole = hashlib.sha256()
    for part in parts:
        # File names may hold bytes that are not UTF-8.
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()
