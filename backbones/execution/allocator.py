"""Keep freed memory in the process: saves a third of the forward pass at 224 px, nothing at 96 px.

Measured in ``sfm extract`` with lite0 (``python benchmarks/execution.py``). The settings change the whole
process, so only a program may make them: the command line does, the library does not.
"""

import ctypes
import platform
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's ``mallopt(3)``."""

KEEP_BELOW_BYTES = 2**30 - 1
"""Larger allocations are returned to the kernel."""

LARGE_INPUT = 128
"""Activations of batches of larger images do not fit the 64 MiB heaps of threads."""

SINGLE_HEAP_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Environment that has the effect of :func:`configure_malloc_single_heap` on a process yet to start."""


def configure_malloc_to_keep_memory() -> None:
    """Make this process reuse the memory that it frees, where the C library is glibc; elsewhere, do nothing.

    Otherwise tensors of a megabyte or more are unmapped when they are freed, and the kernel clears every page
    anew when the next batch touches it. Call it once, before the first batch: the memory of the largest batch
    stays with the process.
    """
    set_glibc_malloc_options({M_MMAP_THRESHOLD: KEEP_BELOW_BYTES, M_TRIM_THRESHOLD: KEEP_BELOW_BYTES})


def configure_malloc_single_heap() -> None:
    """Make the threads of this process share the main heap, where the C library is glibc.

    Otherwise each thread has heaps of its own, of 64 MiB at most, and larger tensors are unmapped when they
    are freed whatever the thresholds. Small tensors are faster in them: they stay in a core's cache.

    Call it at the very beginning, before numpy and torch start threads: a thread keeps the heap it has.
    """
    set_glibc_malloc_options({M_ARENA_MAX: 1})


def set_glibc_malloc_options(options: Mapping[int, int]) -> None:
    """Set parameters of glibc's allocator; do nothing with another allocator."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, value in options.items():
            library.mallopt(parameter, value)
