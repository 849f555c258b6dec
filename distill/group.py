"""The processes that a run is shared among: each has the images of some classes, all know all features."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfm.errors import InputError
from sfm.text import summarize_error


class LostProcess(InputError):  # noqa: N818 - named for what has happened
    """Another process of the run has ended, and this one cannot go on without it."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of a run, before it has met them.

    Attributes
    ----------
    rank, size : int
        Which it is, from 0, and how many there are.
    local : int
        Which it is on its machine: the number of its GPU.
    meeting : str
        Where they meet: an ``init_method`` of ``torch.distributed``.
    """

    rank: int
    size: int
    local: int
    meeting: str = "env://"


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them.

    All must call the methods that exchange something, in the same order; those raise :class:`LostProcess`
    where one has ended.

    Attributes
    ----------
    rank, size : int
        Which this process is, from 0, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.rank == 0

    def shares(self, classes: int, each: int = 1) -> list[slice]:
        """Cut the rows of all classes, `each` per class, into one part per process; the first is largest."""
        few, more = divmod(classes, self.size)
        ends = [0]
        for rank in range(self.size):
            ends.append(ends[-1] + few + (rank < more))
        return [slice(start * each, end * each) for start, end in pairwise(ends)]

    def share(self, classes: int, each: int = 1) -> slice:
        """Return which rows are this process's; see :meth:`shares`."""
        return self.shares(classes, each)[self.rank]

    def everyones(self, rows: Tensor, place: slice, total: int) -> Tensor:
        """Return the rows of all processes, each in its place, shape (total, ...)."""
        if self.size == 1:
            return rows
        # A sum with zeros: exact, and unlike a gather it takes parts of different sizes on every backend.
        whole = rows.new_zeros((total, *rows.shape[1:]))
        whole[place] = rows
        with _exchanging():
            dist.all_reduce(whole)
        return whole

    def collected(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes on the first one, on the CPU; on the others, their own.

        Parameters
        ----------
        rows : Tensor, shape (counts[rank], ...)
        counts : sequence of int
            How many rows each process has.
        """
        if self.size == 1:
            return rows
        own = rows.cpu().contiguous()
        with _exchanging():
            if not self.first:
                if len(own):
                    dist.send(own, 0)
                return own
            whole = own.new_empty((sum(counts), *own.shape[1:]))
            parts = torch.split(whole, list(counts))
            parts[0].copy_(own)
            for rank in range(1, self.size):
                if counts[rank]:
                    dist.recv(parts[rank], rank)
        return whole

    def most(self, value: int) -> int:
        """Return the largest of the processes' values."""
        if self.size == 1:
            return value
        known = torch.tensor(int(value))
        with _exchanging():
            dist.all_reduce(known, dist.ReduceOp.MAX)
        return int(known)

    def told(self, value: Any) -> Any:
        """Return the first process's value."""
        if self.size == 1:
            return value
        box = [value]
        with _exchanging():
            dist.broadcast_object_list(box, 0)
        return box[0]


ALONE = Group()


def launched() -> Place | None:
    """Return the place that ``torchrun`` gave this process; None if it was not started so."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    rank = int(os.environ["RANK"])
    return Place(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


@contextmanager
def joined(place: Place | None, device: str) -> Iterator[Group]:
    """Meet the other processes, for a while; each takes the GPU that its place says, if they use GPUs.

    Raises
    ------
    InputError
        If there is no such GPU, or the others do not come.
    """
    if place is None:
        yield ALONE
        return
    if device != "cpu" and torch.cuda.is_available():
        if place.local >= torch.cuda.device_count():
            raise InputError(
                f"process {place.local} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "start one process per GPU, or choose --device cpu"
            )
        torch.cuda.set_device(place.local)
    with _exchanging():
        dist.init_process_group(init_method=place.meeting, rank=place.rank, world_size=place.size)
    try:
        yield Group(place.rank, place.size)
    finally:
        dist.destroy_process_group()


@contextmanager
def _exchanging() -> Iterator[None]:
    """Turn what torch raises for a broken connection, a RuntimeError, into :class:`LostProcess`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another process of this run has ended ({summarize_error(error)}): see what it says; "
            "--resume goes on"
        ) from error
