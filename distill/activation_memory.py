"""Choose micro-batch size and number of kept graphs by the measured memory of activations."""

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
    saved_bytes: dict[int, int] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    view = torch.zeros(1, 3, size, size, device=backbone.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        backbone.features(view)
    return sum(saved_bytes.values())


def measure_free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), _read_container_free_bytes())


def _read_container_free_bytes() -> int:
    limit, usage = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**63 - 1
    return int(limit.read_text()) - int(usage.read_text())


def choose_micro_batch(images: int, views: int, view_bytes: int, free: int, kind: str = "cpu") -> int:
    """Return the micro-batch size: as many images as fit, in micro-batches of equal size.

    A last micro-batch of a few images would cost about as much as a full one.

    Parameters
    ----------
    images : int
        Number of images.
    views : int
        Views per image.
    view_bytes, free : int
        See :func:`measure_activation_bytes` and :func:`measure_free_memory`.
    kind : {"cpu", "cuda"}
        Type of the device.

    Returns
    -------
    int
        At least 1.
    """
    fit = int(MEMORY_SHARE * free) // (view_bytes * views)
    most = max(1, min(images, MAX_VIEWS[kind] // views, fit))
    return math.ceil(images / math.ceil(images / most))


def choose_graph_count(images: int, views: int, view_bytes: int, free: int, kind: str = "cpu") -> int:
    """Return the number of images whose autograd graphs are kept between forward and backward.

    Parameters
    ----------
    images, views, view_bytes, free, kind
        See :func:`choose_micro_batch`.

    Returns
    -------
    int
        0 or more.
    """
    most = min(int(MEMORY_SHARE * free), MAX_GRAPH_BYTES[kind])
    return min(images, most // (view_bytes * views))
