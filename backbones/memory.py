"""Keep the C library from handing memory back to the kernel between two batches of the same size."""

import ctypes
import platform
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's ``mallopt(3)``."""

KEPT_BYTES = 2**30 - 1

LARGE_INPUT = 128
"""Pixels; activations of batches of larger images do not fit the 64 MiB heaps of threads."""

ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""What does for a process that is yet to start what :func:`share_one_heap` does for this one."""


def keep_freed_memory() -> None:
    """Make this process reuse the memory that it frees, where the C library is glibc; elsewhere, do nothing.

    Tensors of a megabyte or more are otherwise unmapped when they are freed, or the top of the heap is, and
    the kernel clears every page anew when the next batch touches it.
    """
    set_options({M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES})


def share_one_heap() -> None:
    """Make the threads of this process share the main heap, where the C library is glibc.

    Otherwise each thread has heaps of its own, of 64 MiB at most, and larger tensors are unmapped when they
    are freed whatever the thresholds. Small ones are better off there: the cache of a core knows them.

    A heap that a thread has already is not taken away, so this belongs to the very beginning, before numpy
    and torch start threads.
    """
    set_options({M_ARENA_MAX: 1})


def set_options(options: Mapping[int, int]) -> None:
    """Set parameters of glibc's allocator; do nothing where there is another."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, value in options.items():
            library.mallopt(parameter, value)
