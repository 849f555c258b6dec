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


def measure_activation_bytes_per_view(backbone: Backbone) -> int:
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


def measure_free_memory_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), _read_container_free_bytes())


def _read_container_free_bytes() -> int:
    limit, usage = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**63 - 1
    return int(limit.read_text()) - int(usage.read_text())


def choose_micro_batch_size(
    image_count: int, views_per_image: int, bytes_per_view: int, free_bytes: int, device_type: str = "cpu"
) -> int:
    """Return the micro-batch size: as many images as fit, in micro-batches of equal size.

    A last micro-batch of a few images would cost about as much as a full one.

    Parameters
    ----------
    image_count : int
        Number of images.
    views_per_image : int
        Views per image.
    bytes_per_view, free_bytes : int
        See :func:`measure_activation_bytes_per_view` and :func:`measure_free_memory_bytes`.
    device_type : {"cpu", "cuda"}
        Type of the device.

    Returns
    -------
    int
        At least 1.
    """
    fit = int(MEMORY_SHARE * free_bytes) // (bytes_per_view * views_per_image)
    most = max(1, min(image_count, MAX_VIEWS[device_type] // views_per_image, fit))
    return math.ceil(image_count / math.ceil(image_count / most))


def choose_kept_graph_image_count(
    image_count: int, views_per_image: int, bytes_per_view: int, free_bytes: int, device_type: str = "cpu"
) -> int:
    """Return the number of images whose autograd graphs are kept between forward and backward.

    Parameters
    ----------
    image_count, views_per_image, bytes_per_view, free_bytes, device_type
        See :func:`choose_micro_batch_size`.

    Returns
    -------
    int
        0 or more.
    """
    most = min(int(MEMORY_SHARE * free_bytes), MAX_GRAPH_BYTES[device_type])
    return min(image_count, most // (bytes_per_view * views_per_image))
