"""Features of augmented views, computed once and used by every mode, seed and epoch."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.crops import Crops, draw_crops
from sfm.backbones.execution.determinism import tf32_disabled
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.views import apply_crops
from sfm.eval.training import Purpose, Told, nobody_told
from sfm.eval.work import KeptFeatures, Work, work_key
from sfm.random_streams import make_rng
from sfm.stats_store.digests import compute_array_digest

# Input pixels of the views computed together. On a CPU, few: activations that the allocator keeps for the
# next batch cost no page faults, which are a third of the time of larger ones. On a GPU, enough to fill it.
PIXELS_AT_ONCE, PIXELS_AT_ONCE_ON_GPU = 2**18, 2**24
VIEWS_PER_STREAM = 50

Drawn = TypeVar("Drawn", np.float64, np.bool_)


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


def draw_views(images: LabelledImages, views: int, seed: int) -> Crops:
    """Draw flips and random resized crops.

    A view depends on the seed, its image's place and its own number alone: asking for more of them, or for
    more images, changes none.

    The boxes belong to the images and not to a backbone: backbones of different input sizes see the same
    piece of an image, and a view means the same to all of them.

    Parameters
    ----------
    images : LabelledImages
    views : int
        Per image.
    seed : int
        Of the run.

    Returns
    -------
    Crops
        All views of the first image, then all of the second, and so on.
    """
    side = images.pixels.shape[1]
    drawn = [
        draw_crops(make_rng(seed, Purpose.VIEWS, image, block), VIEWS_PER_STREAM, side)
        for image in range(len(images.pixels))
        for block in range(-(-views // VIEWS_PER_STREAM))
    ]

    def joined(parts: list[npt.NDArray[Drawn]]) -> npt.NDArray[Drawn]:
        return np.concatenate(parts).reshape(len(images.pixels), -1)[:, :views].reshape(-1)

    return Crops(
        joined([c.top for c in drawn]),
        joined([c.left for c in drawn]),
        joined([c.height for c in drawn]),
        joined([c.width for c in drawn]),
        joined([c.flip for c in drawn]),
    )


def features_of_views(
    backbone: Backbone,
    images: LabelledImages,
    crops: Crops,
    on_views: Told = nobody_told,
    work: Work | None = None,
) -> Tensor:
    """Compute the feature of every view of every image, or of those that are not done yet.

    Parameters
    ----------
    backbone : Backbone
    images : LabelledImages
    crops : Crops
        As :func:`draw_views` gives them.
    on_views : callable, optional
        Told the views done and how many there are.
    work : Work, optional
        Where features are kept; batches are the same as without it, and so is every bit.

    Returns
    -------
    Tensor, shape (image, view, feature), float32
        On the backbone's device.
    """
    size = backbone.card.preprocessing.input_size
    pixels = pixels_to_tensor(images.pixels).to(backbone.device).contiguous()
    count, total = len(pixels), len(crops.top)
    most = PIXELS_AT_ONCE if backbone.device.type == "cpu" else PIXELS_AT_ONCE_ON_GPU
    step = max(1, most // size**2)
    features = torch.empty((total, backbone.card.features), device=backbone.device)
    kept = KeptFeatures(work, features_key(backbone, images, crops, step), features) if work else None
    done = kept.load() if kept else 0
    if done:
        on_views(done, total)
    try:
        with torch.inference_mode(), tf32_disabled():
            for start in range(done, total, step):
                some = slice(start, min(start + step, total))
                boxes = Crops(
                    crops.top[some], crops.left[some], crops.height[some], crops.width[some], crops.flip[some]
                )
                image = torch.arange(some.start, some.stop, device=backbone.device) // (total // count)
                features[some] = backbone.features(apply_crops(pixels[image], boxes, size))
                done = some.stop
                if kept:
                    kept.keep(done)
                on_views(done, total)
    finally:
        if kept:
            kept.flush(done)
    return features.view(count, total // count, -1)


def features_key(backbone: Backbone, images: LabelledImages, crops: Crops, step: int) -> str:
    """Name everything that the features of views depend on."""
    boxes = (crops.top, crops.left, crops.height, crops.width, crops.flip)
    return work_key(
        features=backbone.card.hash,
        images=compute_array_digest(images.pixels),
        crops=[compute_array_digest(box) for box in boxes],
        step=step,
        device=backbone.device,
    )
