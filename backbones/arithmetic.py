"""What a GPU does with numbers: float32 as float32, and the same bits whenever the same is computed."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Without it cuBLAS may add up in another order in another run. It is read when cuBLAS is first used and never
# again, so that it cannot wait until it matters.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def whole_float32() -> Iterator[None]:
    """Let convolutions on a GPU use all bits of float32 for a while; torch leaves out 13 of them.

    Who has told torch otherwise by ``fp32_precision`` has it so.
    """
    cudnn: Any = torch.backends.cudnn
    with warnings.catch_warnings():
        # Versions of torch differ in which of its two ways to say this they would rather have.
        warnings.simplefilter("ignore")
        try:
            before = cudnn.allow_tf32
            cudnn.allow_tf32 = False
        except RuntimeError:
            before = None
    try:
        yield
    finally:
        if before is not None:
            cudnn.allow_tf32 = before


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Let a GPU give the same bits whenever it computes the same, for a while; a CPU does.

    An operation that cannot raises a RuntimeError.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It would write what nobody reads.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
        settings.fill_uninitialized_memory = fill
