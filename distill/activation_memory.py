"""How many images fit: activations are counted, not guessed."""

import math
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sfm.backbones.build import Backbone

MAX_VIEWS = {"cpu": 34, "cuda": 25}
"""Larger micro-batches are hardly faster per view, so their memory would be for nothing."""

MAX_GRAPH_BYTES = {"cpu": 120 * 2**20, "cuda": 0}
"""What the graphs of images that need not go forward twice may take. It does not grow with their number.

On a GPU there are none: a recorded backbone has one graph, see :mod:`sfm.backbones.execution.cuda_graphs`.
"""

MEMORY_SHARE = 0.25
"""Part of the free memory that activations may take; the rest is for buffers, other levels and neighbours."""


def count_activation_bytes(backbone: Backbone) -> int:
    """Count what autograd keeps between forward and backward of one view, in bytes.

    Weights are not counted: they are there anyway.
    """
    size = backbone.card.preprocessing.input_size
    weights = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*backbone.model.parameters(), *backbone.model.buffers())
    }
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    view = torch.zeros(1, 3, size, size, device=backbone.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        backbone.features(view)
    return sum(kept.values())


def read_free_bytes(device: torch.device) -> int:
    """Return how much memory could be taken now: of the GPU, or of the machine and the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), _read_container_free_bytes())


def _read_container_free_bytes() -> int:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**63 - 1
    return int(limit.read_text()) - int(used.read_text())


def choose_micro_batch(images: int, views: int, view_bytes: int, free: int, kind: str = "cpu") -> int:
    """Return how many images to look at together: as many as fit and are of use, and all parts alike.

    A last part of a few images would cost about as much as a full one.

    Parameters
    ----------
    images : int
        In all.
    views : int
        Of each image.
    view_bytes, free : int
        See :func:`count_activation_bytes` and :func:`read_free_bytes`.
    kind : {"cpu", "cuda"}
        Of device.

    Returns
    -------
    int
        At least 1.
    """
    fit = int(MEMORY_SHARE * free) // (view_bytes * views)
    most = max(1, min(images, MAX_VIEWS[kind] // views, fit))
    return math.ceil(images / math.ceil(images / most))


def choose_graph_count(images: int, views: int, view_bytes: int, free: int, kind: str = "cpu") -> int:
    """Return of how many images to keep the graphs while the others are looked at.

    Parameters
    ----------
    images, views, view_bytes, free, kind
        See :func:`choose_micro_batch`.

    Returns
    -------
    int
        Maybe 0.
    """
    most = min(int(MEMORY_SHARE * free), MAX_GRAPH_BYTES[kind])
    return min(images, most // (view_bytes * views))
