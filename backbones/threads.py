"""How many CPU threads compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def limit_threads(threads: int | None) -> Iterator[None]:
    """Use so many CPU threads for a while, in torch and in numpy; None leaves them as they are.

    Their number shapes sums, and so the last bits.
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
