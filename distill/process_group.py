"""Process groups: the classes of a run are split among processes, all of which gather all features."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sfm.errors import DamageError, InputError
from sfm.text import get_first_error_line

Result = TypeVar("Result")


class LostProcessError(InputError):
    """Another process of the run has ended, so this one cannot continue."""


@dataclass(frozen=True)
class DistributedEnv:
    """What a process needs to join a process group.

    Attributes
    ----------
    rank, world_size : int
        Rank of the process, from 0, and number of processes.
    local_rank : int
        Rank on its machine: the number of its GPU.
    init_method : str
        Rendezvous URL, as ``torch.distributed.init_process_group`` takes it.
    """

    rank: int
    world_size: int
    local_rank: int
    init_method: str = "env://"


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, and the rank of this one.

    All processes must call the collective methods in the same order; these raise
    :class:`LostProcessError` where a process has ended.

    Attributes
    ----------
    rank, size : int
        Rank of this process, from 0, and number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.rank == 0

    def split_rows(self, class_count: int, rows_per_class: int = 1) -> list[slice]:
        """Split the rows of all classes into one slice per process; the first is the largest."""
        quotient, remainder = divmod(class_count, self.size)
        stops = [0]
        for rank in range(self.size):
            stops.append(stops[-1] + quotient + (rank < remainder))
        return [slice(start * rows_per_class, stop * rows_per_class) for start, stop in pairwise(stops)]

    def count_rows_per_process(self, class_count: int, rows_per_class: int = 1) -> list[int]:
        """Return the number of rows of each process; see :meth:`split_rows`."""
        return [rows.stop - rows.start for rows in self.split_rows(class_count, rows_per_class)]

    def get_own_row_slice(self, class_count: int, rows_per_class: int = 1) -> slice:
        """Return which rows are this process's; see :meth:`split_rows`."""
        return self.split_rows(class_count, rows_per_class)[self.rank]

    def all_gather(self, rows: Tensor, own_rows: slice, total_row_count: int) -> Tensor:
        """Return the rows of all processes in order, shape (total, ...)."""
        if self.size == 1:
            return rows
        # A sum with zeros: exact, and unlike a gather it takes parts of different sizes on every backend.
        gathered = rows.new_zeros((total_row_count, *rows.shape[1:]))
        gathered[own_rows] = rows
        with _translate_dist_errors():
            dist.all_reduce(gathered)
        return gathered

    def gather_to_rank0(self, rows: Tensor, row_count_by_rank: Sequence[int]) -> Tensor:
        """Return the rows of all processes in rank 0, on the CPU; other ranks get their own.

        Parameters
        ----------
        rows : Tensor, shape (row_count_by_rank[rank], ...)
        row_count_by_rank : sequence of int
            Number of rows of each process.
        """
        if self.size == 1:
            return rows
        own = rows.cpu().contiguous()
        with _translate_dist_errors():
            if not self.is_rank0:
                if len(own):
                    dist.send(own, 0)
                return own
            gathered = own.new_empty((sum(row_count_by_rank), *own.shape[1:]))
            parts = torch.split(gathered, list(row_count_by_rank))
            parts[0].copy_(own)
            for rank in range(1, self.size):
                if row_count_by_rank[rank]:
                    dist.recv(parts[rank], rank)
        return gathered

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the processes' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(int(value))
        with _translate_dist_errors():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def broadcast_object(self, value: Any) -> Any:
        """Return the value of rank 0."""
        if self.size == 1:
            return value
        objects = [value]
        with _translate_dist_errors():
            dist.broadcast_object_list(objects, 0)
        return objects[0]

    def call_on_rank0(self, function: Callable[[], Result]) -> Result:
        """Return what a function returns in rank 0; the others do not call it.

        Raises
        ------
        InputError, DamageError
            In all processes, if the function raises one.
        """
        outcome: Result | InputError | DamageError | None = None
        if self.is_rank0:
            try:
                outcome = function()
            except (InputError, DamageError) as error:
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, InputError | DamageError):
            raise outcome
        return cast(Result, outcome)


SINGLE_PROCESS = ProcessGroup()


def read_distributed_env() -> DistributedEnv | None:
    """Read the environment that ``torchrun`` gave this process; None without ``torchrun``."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return None
    rank = int(os.environ["RANK"])
    return DistributedEnv(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)))


@contextmanager
def init_process_group(env: DistributedEnv | None, device: str) -> Iterator[ProcessGroup]:
    """Join the process group, and leave it in the end; with GPUs, use the one of the local rank.

    Parameters
    ----------
    env : DistributedEnv or None
        None: there is this process only.
    device : {"auto", "cpu", "cuda"}

    Raises
    ------
    InputError
        If there is no such GPU, or the other processes do not join.
    """
    if env is None:
        yield SINGLE_PROCESS
        return
    if device != "cpu" and torch.cuda.is_available():
        if env.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {env.local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "start one process per GPU, or choose --device cpu"
            )
        torch.cuda.set_device(env.local_rank)
    with _translate_dist_errors():
        dist.init_process_group(init_method=env.init_method, rank=env.rank, world_size=env.world_size)
    try:
        yield ProcessGroup(env.rank, env.world_size)
    finally:
        dist.destroy_process_group()


@contextmanager
def _translate_dist_errors() -> Iterator[None]:
    """Turn the RuntimeError of a broken connection into :class:`LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"another process of this run has ended ({get_first_error_line(error)}): see its error, then "
            "repeat the command with --resume"
        ) from error
