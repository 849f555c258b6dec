"""Keep the C library from handing memory back to the kernel between two batches of the same size."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's ``mallopt(3)``."""

KEPT_BYTES = 2**30 - 1

LARGE_INPUT = 128
"""Pixels; activations of batches of larger images do not fit the 64 MiB heaps of threads."""


def keep_freed_memory(image_size: int) -> None:
    """Make this process reuse the memory that it frees, where the C library is glibc; elsewhere, do nothing.

    Tensors of a megabyte or more are otherwise unmapped when they are freed, or the top of the heap is, and
    the kernel clears every page anew when the next batch touches it.

    Each thread has heaps of its own, and with them memory that its core's cache knows; but of 64 MiB at most,
    and larger tensors are unmapped whatever the thresholds. With large images all threads share the main
    heap, which has no such limit.

    Parameters
    ----------
    image_size : int
        Side of the images to come, in pixels.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        if image_size > LARGE_INPUT:
            library.mallopt(M_ARENA_MAX, 1)
