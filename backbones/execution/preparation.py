"""Prepare a backbone for one execution mode, with a logged reason for a fallback to another mode."""

import logging
import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfm.backbones.execution.compilation import compile_model_if_equivalent
from sfm.backbones.execution.cuda_graphs import CudaGraphModel
from sfm.backbones.execution.input_gradient import drop_packed_weights, make_input_grad_model
from sfm.backbones.execution.modes import ExecutionMode, ExecutionOption
from sfm.text import get_first_error_line

if TYPE_CHECKING:
    from sfm.backbones.build import Backbone

EXECUTION_ERRORS = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)
"""Errors that compiling and recording may raise."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedModel:
    """A model for one execution mode.

    Attributes
    ----------
    model : nn.Module
        Equal to the backbone's model, up to rounding.
    mode : ExecutionMode
        The actual mode.
    reason : str or None
        Why it is not the requested mode, or which part of that mode is missing.
    """

    model: nn.Module
    mode: ExecutionMode
    reason: str | None = None


def prepare(backbone: "Backbone", example_images: Tensor, mode: ExecutionMode) -> PreparedModel:
    """Return a backbone's model for an execution mode, or for the nearest one that works.

    A mode that fails, or whose features or gradients differ by more than rounding, falls back: ``compiled``
    to ``cuda-graph``, that to ``input-grad``, and that to ``eager``. Each fallback is logged.

    Parameters
    ----------
    backbone : Backbone
        On its device and in its precision; left as it is. The result shares its weights.
    example_images : Tensor, shape (batch, 3, input_size, input_size)
        Normalised images, of the final batch size: see :func:`make_example_images`.
    mode : ExecutionMode

    Returns
    -------
    PreparedModel
    """
    if mode == "eager":
        return PreparedModel(backbone.model, "eager")
    reasons: list[str] = []
    if mode == "compiled":
        try:
            model = compile_model_if_equivalent(backbone.model, example_images)
            if model is not None:
                return PreparedModel(CudaGraphModel(model, example_images), "compiled")
            reasons.append("the compiled backbone computes other features")
        except EXECUTION_ERRORS as error:
            reasons.append(f"the backbone cannot be compiled: {get_first_error_line(error)}")
    lean = make_input_grad_model(backbone.model, example_images[:1])
    actual_mode: ExecutionMode = "eager" if lean.model is backbone.model else "input-grad"
    if lean.unchanged_reason:
        reasons.append(lean.unchanged_reason)
    graph: nn.Module | None = None
    if mode in ("compiled", "cuda-graph"):
        try:
            graph, actual_mode = CudaGraphModel(lean.model, example_images), "cuda-graph"
        except EXECUTION_ERRORS as error:
            reasons.append(f"the backbone cannot be recorded: {get_first_error_line(error)}")
    reason = "; ".join(reasons) or None
    if reason:
        logger.warning("%s runs in mode %s, not %s: %s", backbone.card.spec, actual_mode, mode, reason)
    elif actual_mode == "eager":
        reason = "the model has no convolutions that would gain"
    return PreparedModel(graph or lean.model, actual_mode, reason)


def optimize_backbone(
    backbone: "Backbone", batch_size: int, mode: ExecutionMode
) -> "tuple[Backbone, PreparedModel]":
    """Return a backbone whose model is prepared for batches of one size, and what was prepared."""
    prepared = prepare(backbone, make_example_images(backbone, batch_size), mode)
    return replace(backbone, model=prepared.model), prepared


def optimize_for_cpu_inference(backbone: "Backbone", execution: ExecutionOption = "auto") -> "Backbone":
    """Return a backbone that computes the same features, up to rounding, in four fifths of the time on a CPU.

    On a GPU, or with "eager", it is the backbone itself.
    """
    if execution == "eager" or backbone.device.type != "cpu":
        return backbone
    optimized, _ = optimize_backbone(backbone, 1, "input-grad")
    drop_packed_weights(optimized.model)
    return optimized


def make_example_images(backbone: "Backbone", batch_size: int) -> Tensor:
    """Return random normalised images of a backbone's input size, on its device and in its memory layout."""
    size = backbone.card.preprocessing.input_size
    example = torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return example.to(backbone.device).contiguous(memory_format=backbone.memory_format)


def count_cuda_graph_bytes(backbone: "Backbone") -> int:
    """Return the GPU memory that CUDA graphs hold; torch does not count it as allocated."""
    return backbone.model.held_bytes if isinstance(backbone.model, CudaGraphModel) else 0
