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
                listing=compute_digest(name, *("\t".join(line) for line in lines)),
            )

        ids = Path(text, "classes.txt").read_text().split()
        return Source("pairs", f"pairs:{text}", ids, ids, split("train"), split("test"), decode_image)
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from sfm.backbones.rendering import Rendering
from sfm.pipeline.sources.inventory import Inventory
from sfm.pipeline.sources.prefetch import prefetch_samples
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.stats_store.digest import BLOCK_ROWS


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
        """Yield samples, as :meth:`iter_samples` does, but all of them read.

        Raises
        ------
        InputError
            If a file cannot be read.
        """
        return prefetch_samples(self.iter_samples(rows, sizes))

    def iter_samples(
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

    return make_split(labels, samples, path, listing)


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

    return make_split(labels, samples, where, listing)


def make_split(
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


def compute_digest(*parts: str | bytes) -> str:
    """Return the SHA-256 (hexadecimal) of parts, each framed by its length."""
    whole = hashlib.sha256()
    for part in parts:
        # File names may hold bytes that are not UTF-8.
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()
