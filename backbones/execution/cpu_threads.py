"""Limit the number of CPU threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def limit_threads(threads: int | None) -> Iterator[None]:
    """Limit torch and numpy to a number of CPU threads within a context; None leaves them as they are.

    The number of threads decides how sums are split, and so their last bits.
    """
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    with threadpool_limits(limits=threads, user_api="blas"):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
