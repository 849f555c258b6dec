"""Settings of a whole process that make backbones faster or their bits repeatable. Imports no torch.

The command line calls :func:`configure_process`; the library never does, because the settings affect the
whole program.
"""

import os

from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory
from sfm.backbones.execution.wait_policy import set_passive_openmp_wait_if_crowded

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def configure_process(planned_thread_count: int | None = None) -> None:
    """Set up this process to compute backbones: wait policy of threads, freed memory, workspace of cuBLAS.

    Call it before torch is imported: the wait policy is read once, when torch is loaded.

    Parameters
    ----------
    planned_thread_count : int, optional
        CPU threads of the computation; see :func:`.wait_policy.set_passive_openmp_wait_if_crowded`.
    """
    set_passive_openmp_wait_if_crowded(planned_thread_count)
    configure_malloc_to_keep_memory()
    set_default_cublas_workspace()


def set_default_cublas_workspace() -> None:
    """Give cuBLAS a fixed workspace, without which its order of summation may vary between runs.

    Sets an environment variable, unless the user has, that cuBLAS reads at its first use in a process.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")
