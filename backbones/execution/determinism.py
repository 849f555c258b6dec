"""Arithmetic of a GPU: float32 without TF32, and deterministic algorithms."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sfm.backbones.build import Backbone


@contextmanager
def tf32_disabled() -> Iterator[None]:
    """Disable TF32 for convolutions on a GPU within a context: TF32 drops 13 bits of float32.

    An explicit setting of ``fp32_precision`` is kept.
    """
    cudnn: Any = torch.backends.cudnn
    with warnings.catch_warnings():
        # Versions of torch differ in which of the two settings they deprecate.
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
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Use deterministic CUDA algorithms within a context; on a CPU all are.

    An operation without a deterministic algorithm raises a RuntimeError.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling uninitialised memory costs time, and nothing here reads it.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
        settings.fill_uninitialized_memory = fill


@contextmanager
def deterministic_if_supported(backbone: "Backbone") -> Iterator[bool]:
    """Use deterministic algorithms within a context if a backbone's operations have them; yield whether."""
    size, device = backbone.card.preprocessing.input_size, backbone.device
    supported = True
    if device.type == "cuda":
        image = torch.zeros(1, 3, size, size, device=device, requires_grad=True)
        try:
            with deterministic_algorithms(device):
                torch.autograd.grad(backbone.features(image).sum(), image)
                # Raises in a process that has used cuBLAS with another workspace: it cannot be changed any
                # more.
                image.detach()[0, 0] @ image.detach()[0, 0]
        except RuntimeError as error:
            if "deterministic" not in str(error).lower():
                raise
            supported = False
    with deterministic_algorithms(device) if supported else nullcontext():
        yield supported
