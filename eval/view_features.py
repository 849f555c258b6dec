"""Features of augmented views, computed once and used by every mode, seed and epoch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.crops import Crops, concatenate_crops, draw_crops, select_crops
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.view_batches import choose_view_batch_size, compute_features_of_views
from sfm.eval.training import CountCallback, RandomStreamPurpose, ignore_progress_count
from sfm.eval.work_folder import ResumableFeatures, WorkFolder, compute_work_key
from sfm.random_streams import make_rng
from sfm.stats_store.digests import compute_array_digest

VIEWS_PER_STREAM = 50


@dataclass(frozen=True)
class LabelledImages:
    """Square images with the index of their class.

    Attributes
    ----------
    pixels : ndarray of uint8, shape (image, y, x, channel)
    labels : ndarray of int64, shape (image,)
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def draw_view_crops(
    images: LabelledImages, views_per_image: int, run_seed: int, crop_edge: CropEdge = "clip"
) -> Crops:
    """Draw the random resized crops and flips of augmented views.

    A view depends only on the seed, the index of its image and its own index: more views or more images do
    not change it.

    The boxes do not depend on a backbone: backbones of different input sizes see the same piece of an image.

    Parameters
    ----------
    images : LabelledImages
    views_per_image : int
        Per image.
    run_seed : int
        Seed of the run.
    crop_edge : {"clip", "zero"}
        See :func:`~sfm.backbones.crops.draw_crops`.

    Returns
    -------
    Crops
        All views of the first image, then all of the second, and so on.
    """
    side = images.pixels.shape[1]
    blocks = range(-(-views_per_image // VIEWS_PER_STREAM))

    def draw_image_crops(image: int) -> Crops:
        streams = (make_rng(run_seed, RandomStreamPurpose.VIEWS, image, block) for block in blocks)
        drawn = concatenate_crops(
            [draw_crops(rng, VIEWS_PER_STREAM, side, edge=crop_edge) for rng in streams]
        )
        return select_crops(drawn, slice(views_per_image))

    return concatenate_crops([draw_image_crops(image) for image in range(len(images.pixels))])


def compute_view_features(
    backbone: Backbone,
    images: LabelledImages,
    crops: Crops,
    on_views: CountCallback = ignore_progress_count,
    work_folder: WorkFolder | None = None,
) -> Tensor:
    """Compute the features of all views of all images; those in the work folder are read.

    Parameters
    ----------
    backbone : Backbone
    images : LabelledImages
    crops : Crops
        From :func:`draw_view_crops`.
    on_views : callable, optional
        Called with the views done and their total.
    work_folder : WorkFolder, optional
        Keeps features for a resumed evaluation; batches are the same as without it, and so is every bit.

    Returns
    -------
    Tensor, shape (image, view, feature), float32
        On the backbone's device.
    """
    pixels = pixels_to_tensor(images.pixels).to(backbone.device).contiguous()
    image_count, total = len(pixels), len(crops.top)
    batch_size = choose_view_batch_size(backbone)
    features = torch.empty((total, backbone.card.features), device=backbone.device)
    resumable = (
        ResumableFeatures(work_folder, make_view_features_key(backbone, images, crops, batch_size), features)
        if work_folder
        else None
    )
    computed_views = resumable.load_stored_view_features() if resumable else 0
    if computed_views:
        on_views(computed_views, total)
    try:
        for start in range(computed_views, total, batch_size):
            batch = slice(start, min(start + batch_size, total))
            features[batch] = compute_features_of_views(backbone, pixels, crops, batch)
            computed_views = batch.stop
            if resumable:
                resumable.write_unwritten_views_if_due(computed_views)
            on_views(computed_views, total)
    finally:
        if resumable:
            resumable.write_unwritten_views(computed_views)
    return features.view(image_count, total // image_count, -1)


def make_view_features_key(backbone: Backbone, images: LabelledImages, crops: Crops, batch_size: int) -> str:
    """Return the digest of all inputs of the features of views."""
    boxes = (crops.top, crops.left, crops.height, crops.width, crops.flip)
    inputs = {
        "features": backbone.card.hash,
        "images": compute_array_digest(images.pixels),
        "crops": [crops.edge, *(compute_array_digest(box) for box in boxes)],
        "batch_size": batch_size,
    }
    return compute_work_key(inputs, backbone.device)
