"""What a GPU does with numbers: float32 as float32, and the same bits whenever the same is computed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without it cuBLAS may add up in another order in another run."""


@contextmanager
def whole_float32() -> Iterator[None]:
    """Let convolutions on a GPU use all bits of float32 for a while; torch leaves out 13 of them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Let a GPU give the same bits whenever it computes the same, for a while; a CPU does.

    An operation that cannot raises a RuntimeError.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.update({name: value for name, value in WORKSPACE.items() if name not in os.environ})
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It would write what nobody reads.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
