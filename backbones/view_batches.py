"""Compute the features of many views of images, one batch of views at a time."""

import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.crops import Crops, select_crops
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.backbones.views import apply_crops

# Input pixels of the views computed together. On a CPU, few: activations that the allocator keeps for the
# next batch cost no page faults, which are a third of the time of larger ones. On a GPU, enough to fill it.
CPU_BATCH_PIXELS, GPU_BATCH_PIXELS = 2**18, 2**24


def choose_view_batch_size(backbone: Backbone) -> int:
    """Return the number of views to compute together on the backbone's device."""
    batch_pixels = CPU_BATCH_PIXELS if backbone.device.type == "cpu" else GPU_BATCH_PIXELS
    return max(1, batch_pixels // backbone.card.preprocessing.input_size**2)


def compute_features_of_views(backbone: Backbone, images: Tensor, crops: Crops, view_slice: slice) -> Tensor:
    """Compute the features of a range of views.

    Parameters
    ----------
    backbone : Backbone
    images : Tensor, shape (image, channel, size, size)
        In [0, 1], on the backbone's device.
    crops : Crops
        As many views of every image: all of the first image, then all of the second, and so on.
    view_slice : slice
        Which views, by position in `crops`.

    Returns
    -------
    Tensor, shape (view, feature)
    """
    views_per_image = len(crops.top) // len(images)
    with torch.inference_mode(), tf32_disabled():
        image_indices = (
            torch.arange(view_slice.start, view_slice.stop, device=backbone.device) // views_per_image
        )
        size = backbone.card.preprocessing.input_size
        return backbone.features(apply_crops(images[image_indices], select_crops(crops, view_slice), size))
