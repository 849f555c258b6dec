"""Choose micro-batch and number of graphs by the memory that activations take, which is measured."""

import math
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sfm.backbones.build import Backbone

MAX_VIEWS = {"cpu": 34, "cuda": 25}
"""Largest micro-batch in views, by device: larger ones are hardly faster per view."""

MAX_GRAPH_BYTES = {"cpu": 120 * 2**20, "cuda": 0}
"""Memory for the autograd graphs that are kept between forward and backward, by device.

On a GPU there are none: a recorded backbone has one graph, see :mod:`sfm.backbones.execution.cuda_graphs`.
"""

MEMORY_SHARE = 0.25
"""Share of the free memory for activations; the rest is for buffers and other processes."""


def measure_activation_bytes(backbone: Backbone) -> int:
    """Return the bytes that autograd keeps between forward and backward of one view.

    Weights are not counted.
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


def measure_free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), _read_container_free_bytes())


def _read_container_free_bytes() -> int:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**63 - 1
    return int(limit.read_text()) - int(used.read_text())


def choose_micro_batch(images: int, views: int, view_bytes: int, free: int, kind: str = "cpu") -> int:
    """Return how many images go through the backbone together: as many as fit, in equal micro-batches.

    A last micro-batch of a few images would cost about as much as a full one.

    Parameters
    ----------
    images : int
        In all.
    views : int
        Of each image.
    view_bytes, free : int
        See :func:`measure_activation_bytes` and :func:`measure_free_memory`.
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
    """Return for how many images to keep the autograd graphs between forward and backward.

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
