r"""The interface of a source of labelled images: `Source`, `Split`, `Shard`, and functions that make splits.

A source is data: two splits, each a sequence of *shards*, and a function that decodes one sample. A shard is
read in order by one reader, any number of times. It is the unit that workers take, the unit that is resumed,
and the most that an interrupted run has to repeat. There are two kinds of split:

- Labels are known before anything is read (folders, index files, tables with a label column). Every shard
  has its labels. :func:`make_file_split` makes shards of samples that are files of their own, and
  :func:`make_indexed_split` of samples that a function reads by position.
- Labels come with the samples (tar shards). A shard's ``labels`` are None, samples name their class, and the
  classes of the dataset are those found in the pass; ``Source.class_ids`` may be None until then.

This is a complete source. It is usable as ``pairs:PATH`` once an installed package declares the entry point
``pairs = "my_package:open_pairs_source"`` in the group ``sfm.sources``::

    def open_pairs_source(path: str) -> Source:
        def make_split(name: str) -> Split:
            lines = [line.split("\t") for line in Path(path, f"{name}.tsv").read_text().splitlines()]
            return make_file_split(
                labels=np.array([ids.index(label) for _, label in lines], dtype=np.int32),
                class_ids=ids,
                path=lambda i: f"{path}/{lines[i][0]}",
                listing_digest=compute_digest(name, *("\t".join(line) for line in lines)),
            )

        ids = Path(path, "classes.txt").read_text().split()
        train, test = make_split("train"), make_split("test")
        return Source("pairs", f"pairs:{path}", ids, ids, train, test, decode_image)

`sfm.testing.SourceTests` tests such a source against this contract.
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
from sfm.stats_store.digests import BLOCK_ROWS


@dataclass(frozen=True)
class Shard:
    """Samples that are read in order.

    Attributes
    ----------
    location : str
        Location of the shard, for messages.
    labels : ndarray of int32, shape (n,), or None
        Index of each sample's class in ``Source.class_ids``; None if labels are known only after reading.
    read : callable
        Takes ascending positions (ndarray of int64), or None for all. Yields a `Sample` or a `SampleFile` for
        each; raises InputError if they cannot be read. It may be called again, in other processes too, and
        yields the same then. One process reads one shard at a time.
    unused_by_kind : Counter
        Number of files that the last complete reading skipped, by kind; empty if known without reading.
    """

    location: str
    labels: npt.NDArray[np.int32] | None
    read: Callable[[npt.NDArray[np.int64] | None], Iterator[Sample | SampleFile]]
    unused_by_kind: Counter[str] = field(default_factory=Counter, compare=False)


@dataclass(frozen=True)
class Split:
    """The samples of one split, in the order in which the source reads them fastest.

    Attributes
    ----------
    shards : tuple of Shard
        Either all of them have labels, or none has.
    listing_digest : str
        Digest (hexadecimal) of what is known about the samples without reading them: names, sizes, times.
    """

    shards: tuple[Shard, ...]
    listing_digest: str

    @property
    def labels(self) -> npt.NDArray[np.int32] | None:
        """Labels of all samples, shape (n,); None if they are known only after reading."""
        known = [shard.labels for shard in self.shards if shard.labels is not None]
        if len(known) < len(self.shards):
            return None
        return np.concatenate([*known, np.zeros(0, dtype=np.int32)])

    def read(
        self, rows: npt.NDArray[np.int64], samples_per_shard: Sequence[int] | None = None
    ) -> Iterator[Sample]:
        """Yield the samples of some rows, read; see :meth:`iter_samples`.

        Raises
        ------
        InputError
            If a file cannot be read.
        """
        return prefetch_samples(self.iter_samples(rows, samples_per_shard))

    def iter_samples(
        self, rows: npt.NDArray[np.int64], samples_per_shard: Sequence[int] | None = None
    ) -> Iterator[Sample | SampleFile]:
        """Yield the samples of some rows; sample files are not read.

        Parameters
        ----------
        rows : ndarray of int64
            Ascending positions in the split.
        samples_per_shard : sequence of int, optional
            Samples per shard; needed if labels are not known.
        """
        if samples_per_shard is None:
            samples_per_shard = [0 if shard.labels is None else len(shard.labels) for shard in self.shards]
        bounds = np.cumsum([0, *samples_per_shard])
        cuts = np.searchsorted(rows, bounds)
        for number, shard in enumerate(self.shards):
            own_rows = rows[cuts[number] : cuts[number + 1]]
            if len(own_rows):
                yield from shard.read(own_rows - bounds[number])


NO_SAMPLES = Split((), "")
"""Held-out split of a dataset without one."""


@dataclass(frozen=True)
class Source:
    """A labelled image dataset with a training and a held-out split.

    Attributes
    ----------
    name : str
        Default name of the dataset in a store.
    spec : str
        The spec as given: ``KIND:PLACE?OPTIONS``.
    class_ids : list of str or None
        Sorted. They identify classes across datasets: folder names, WordNet ids, label numbers. None if the
        classes are those found in the pass.
    class_names : list of str or None
        Display names in the same order; they may repeat. None if they are the ids.
    train, test : Split
        ``NO_SAMPLES`` where nothing is held out.
    decode : callable
        Turns a sample's encoded bytes into an image of any mode; raises OSError or ValueError if it cannot.
        For a GPU it is pickled (by cloudpickle, with what it holds) and called in other processes.
    licence : str
    rendering : Rendering
        How decoded images become opaque 8-bit pixels: the options ``background`` and ``white``.
    inventory : Inventory
        Unused files and automatic choices.
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
        """Labels of all samples, by split; None if they are known only after reading."""
        train, test = self.train.labels, self.test.labels
        return None if train is None or test is None else {"train": train, "test": test}


def make_file_split(
    labels: npt.NDArray[np.int32], class_ids: Sequence[str], path: Callable[[int], str], listing_digest: str
) -> Split:
    """Return a split of sample files, in shards of ``BLOCK_ROWS`` samples.

    Several files are read at the same time, ahead of decoding; for a GPU, in the processes that decode.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
        Index of each sample's class in `class_ids`.
    class_ids : sequence of str
    path : callable
        Returns the path of sample ``i``.
    listing_digest : str
        See `Split`.
    """

    def iter_rows(rows: list[int]) -> Iterator[SampleFile]:
        return (SampleFile(path(i), class_ids[labels[i]]) for i in rows)

    return make_labelled_split(labels, iter_rows, path, listing_digest)


def make_indexed_split(
    labels: npt.NDArray[np.int32],
    class_ids: Sequence[str],
    read: Callable[[int], bytes],
    location: Callable[[int], str],
    listing_digest: str,
) -> Split:
    """Return a split of samples that a function reads by position, in shards of ``BLOCK_ROWS`` samples.

    Samples are read one after the other, in one thread.

    Parameters
    ----------
    labels : ndarray of int32, shape (n,)
        Index of each sample's class in `class_ids`.
    class_ids : sequence of str
    read : callable
        Returns the encoded bytes of sample ``i``.
    location : callable
        Returns the location of sample ``i``, for messages.
    listing_digest : str
        See `Split`.
    """

    def iter_rows(rows: list[int]) -> Iterator[Sample]:
        return (Sample(read(i), class_ids[labels[i]], location(i)) for i in rows)

    return make_labelled_split(labels, iter_rows, location, listing_digest)


def make_labelled_split(
    labels: npt.NDArray[np.int32],
    iter_samples_of_rows: Callable[[list[int]], Iterator[Sample | SampleFile]],
    location: Callable[[int], str],
    listing_digest: str,
) -> Split:
    """Return a split of samples whose labels are known, in shards of ``BLOCK_ROWS`` samples.

    Parameters
    ----------
    iter_samples_of_rows : callable
        Yields the samples of some rows of the split, in their order.
    """

    def make_shard(start: int) -> Shard:
        own_labels = labels[start : start + BLOCK_ROWS]

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample | SampleFile]:
            rows = (np.arange(len(own_labels)) if positions is None else positions) + start
            return iter_samples_of_rows(rows.tolist())

        last = start + len(own_labels) - 1
        return Shard(f"{location(start)} to {location(last)}", own_labels, read)

    return Split(tuple(make_shard(start) for start in range(0, len(labels), BLOCK_ROWS)), listing_digest)


def compute_digest(*parts: str | bytes) -> str:
    """Return the SHA-256 (hexadecimal) of parts, each preceded by its length."""
    sha = hashlib.sha256()
    for part in parts:
        # File names may hold bytes that are not UTF-8.
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()
