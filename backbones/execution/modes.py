"""Names of the ways to compute a backbone. Imports no torch: configurations are read without it."""

from typing import Literal

ExecutionMode = Literal["eager", "input-grad", "compiled", "cuda-graph"]
"""How a backbone is computed.

eager
    Plain PyTorch, layer by layer.
input-grad
    Convolutions keep only what the gradient of the images needs (:mod:`.input_gradient`).
cuda-graph
    Forward and backward are recorded once and replayed (:mod:`.cuda_graphs`), with input-grad where it
    applies.
compiled
    By ``torch.compile`` (:mod:`.compilation`), and then recorded as a CUDA graph.
"""

ExecutionOption = Literal["auto", "eager"]
"""Values of ``--execution``: the fastest mode that works, or plain PyTorch."""
