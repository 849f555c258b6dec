"""Limit the number of CPU threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def limit_cpu_threads(thread_count: int | None) -> Iterator[None]:
    """Limit torch and numpy to a number of CPU threads within a context; None leaves them as they are.

    The number of threads decides how sums are split, and so their last bits.
    """
    if thread_count is None:
        yield
        return
    before = torch.get_num_threads()
    with threadpool_limits(limits=thread_count, user_api="blas"):
        torch.set_num_threads(thread_count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
