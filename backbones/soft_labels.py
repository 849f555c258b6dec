"""Soft labels: probabilities that a linear classifier on a backbone gives to images, averaged over views."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from sfm.backbones.build import Backbone
from sfm.backbones.crops import concatenate_crops, draw_crops
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.view_batches import choose_view_batch_size, compute_features_of_views
from sfm.random_streams import make_rng

LABEL_VIEW_STREAM = 2001
"""Random stream of the views; no stage uses it, so equal seeds share no numbers with training."""


def compute_average_soft_labels(
    backbone: Backbone,
    pixels: npt.NDArray[np.uint8],
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    *,
    views: int,
    temperature: float,
    seed: int,
    on_views: Callable[[int, int], None],
) -> npt.NDArray[np.float32]:
    """Return the mean over views of ``softmax((features @ weight.T + bias) / temperature)``.

    Views are random resized crops with flips. Those of an image depend only on the seed and its index.

    Parameters
    ----------
    backbone : Backbone
    pixels : ndarray of uint8, shape (image, y, x, channel)
        Square images.
    weight : ndarray of float32, shape (class, feature)
    bias : ndarray of float32, shape (class,)
    views : int
        Views per image.
    temperature : float
        Above 1, labels are softer.
    seed : int
    on_views : callable
        Called with the views done and their total.

    Returns
    -------
    ndarray of float32, shape (image, class)
        Every row sums to one.
    """
    image_count, side = len(pixels), pixels.shape[1]
    crops = concatenate_crops(
        [draw_crops(make_rng(seed, LABEL_VIEW_STREAM, image), views, side) for image in range(image_count)]
    )
    images = pixels_to_tensor(pixels).to(backbone.device).contiguous()
    weight_tensor, bias_tensor = (torch.from_numpy(array).to(backbone.device) for array in (weight, bias))
    batch_size, total = choose_view_batch_size(backbone), image_count * views
    # Sums on the CPU: adding rows by index is not deterministic on CUDA.
    sums = np.zeros((image_count, len(weight)))
    for start in range(0, total, batch_size):
        batch = slice(start, min(start + batch_size, total))
        features = compute_features_of_views(backbone, images, crops, batch)
        logits = features @ weight_tensor.T + bias_tensor
        probabilities = (logits / temperature).softmax(-1).double().cpu().numpy()
        np.add.at(sums, np.arange(batch.start, batch.stop) // views, probabilities)
        on_views(batch.stop, total)
    means: npt.NDArray[np.float64] = sums / sums.sum(axis=1, keepdims=True)
    return means.astype(np.float32)
