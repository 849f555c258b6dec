"""Keep the C library from handing memory back to the kernel between two batches of the same size."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt(3)``."""

KEPT_BYTES = 2**30 - 1


def keep_freed_memory() -> None:
    """Make this process reuse the memory that it frees, where the C library is glibc; elsewhere, do nothing.

    Tensors of a megabyte or more are otherwise unmapped when they are freed, or the top of the heap is, and
    the kernel clears every page anew when the next batch touches it.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
