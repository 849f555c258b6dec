"""Linear Gradient Matching, the method to beat (Cazenavette et al., arXiv 2511.16674).

At every step a fresh linear head is drawn. Its cross-entropy gradient on a batch of real images is to be met
by its gradient on augmented copies of the synthetic images; the loss is the cosine distance between the two.
Pyramid, augmentation, optimizer and growth are those of :mod:`sfm.distill`. With a config whose crops show
zeros outside of the image, as the authors' do, views are theirs.

It gets what does not change the method: frozen parameters, folded batch norms, real features without a graph,
and the gradient of the head in closed form where the authors' code differentiates twice. Synthetic images go
through one graph, as there, and the graph is autograd's.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.distill.adam import adam_step, init_adam
from sfm.distill.augment import augment
from sfm.distill.pyramid import decode_pyramid
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import (
    DistillState,
    add_pyramid_level,
    compute_level_gradients,
    draw_step_augmentation,
)
from sfm.pipeline.sources import Source
from sfm.random_streams import make_rng

HEAD_STREAM, BATCH_STREAM = 201, 202
"""Identifiers of random streams that no other module uses."""

HEAD_STD = 0.01
"""Standard deviation of the weights of a new head; its biases are zero."""


@dataclass(frozen=True)
class RealImages:
    """A training split, decoded once.

    Attributes
    ----------
    pixels : ndarray of uint8, shape (image, canvas, canvas, 3)
    labels : ndarray of int64, shape (image,)
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @cached_property
    def cuda_pixels(self) -> Tensor:
        """The pixels on the GPU, so that no step waits for a transfer."""
        return torch.from_numpy(self.pixels).cuda()

    def batch(self, rows: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the images of some rows, shape (row, 3, canvas, canvas), float32 in [0, 1]."""
        if device.type == "cuda":
            pixels = self.cuda_pixels[torch.from_numpy(rows).to(device)]
            floats = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            return floats.div_(255)
        return pixels_to_tensor(self.pixels[rows]).contiguous()


def decode_real_images(
    source: Source, rows: npt.NDArray[np.int64], backbone: Backbone, canvas: int
) -> RealImages:
    """Decode training images at the size of the synthetic ones.

    Parameters
    ----------
    source : Source
        Its labels are known before images are read.
    rows : ndarray of int64
        Ascending positions in the training split.
    backbone : Backbone
        Its resampling rule is used.
    canvas : int
        Side of the images, in pixels.
    """
    labels = source.train.labels
    assert labels is not None
    rule = backbone.card.preprocessing.model_copy(update={"input_size": canvas, "resize": canvas})
    pixels = np.empty((len(rows), canvas, canvas, 3), dtype=np.uint8)
    for row, sample in zip(pixels, source.train.read(rows), strict=True):
        row[:] = resize_and_crop_image(source.decode(sample.data), rule)
    return RealImages(pixels, labels[rows].astype(np.int64))


@lru_cache(maxsize=1)
def shuffle_epoch(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order of the real images in an epoch."""
    return make_rng(seed, BATCH_STREAM, epoch).permutation(count)


def select_batch_rows(seed: int, step: int, count: int, batch: int) -> npt.NDArray[np.int64]:
    """Return the rows of the real images of a step, in shuffled epochs; incomplete batches are dropped.

    Parameters
    ----------
    seed, step : int
        Of the run, and the number of the step in it.
    count, batch : int
        Images in all, at least a batch; images of a step.
    """
    if count < batch:
        raise ValueError(f"a batch of {batch} real images needs as many, there are {count}")
    epoch, position = divmod(step, count // batch)
    return shuffle_epoch(seed, epoch, count)[position * batch : (position + 1) * batch]


def compute_head_gradient(features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the mean cross-entropy of a head without biases yet, as one vector.

    With ``P`` the softmax of the logits and ``Y`` the one-hot labels of n samples, ``dW = (P - Y)^T Z / n``
    and ``db = sum(P - Y) / n``.

    Parameters
    ----------
    features : Tensor, shape (n, D)
        Differentiable.
    labels : Tensor of int64, shape (n,)
    weight : Tensor, shape (C, D)

    Returns
    -------
    Tensor, shape (C * D + C,)
    """
    logits = features @ weight.T
    error = (logits.softmax(1) - F.one_hot(labels, len(weight))) / len(labels)
    return torch.cat([(error.T @ features).flatten(), error.sum(0)])


def lgm_loss(features: Tensor, labels: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """Return one minus the cosine between a head's gradients on synthetic and on real images.

    Parameters
    ----------
    features : Tensor, shape (n, D)
        Of the views of synthetic images; differentiable.
    labels : Tensor of int64, shape (n,)
    real : Tensor, shape (C * D + C,)
        What :func:`compute_head_gradient` gives for the real batch.
    weight : Tensor, shape (C, D)

    Returns
    -------
    Tensor, shape ()
    """
    return 1 - F.cosine_similarity(compute_head_gradient(features, labels, weight), real, dim=0)


def draw_head(run_config: ResolvedDistillConfig, features: int, step: int, device: torch.device) -> Tensor:
    """Draw the weights of a step's head from N(0, .01^2), shape (C, D)."""
    drawn = make_rng(run_config.seed, HEAD_STREAM, step).standard_normal(
        (len(run_config.classes), features), dtype=np.float32
    )
    return torch.from_numpy(HEAD_STD * drawn).to(device)


def run_lgm_step(
    state: DistillState, run_config: ResolvedDistillConfig, backbone: Backbone, real: RealImages
) -> float:
    """Run one training step and update `state`.

    The real batch has as many images as the synthetic ones have views, C * K * A, each seen through one.

    Parameters
    ----------
    state : DistillState
    run_config : ResolvedDistillConfig
        Micro-batch and gradient are not used.
    backbone : Backbone
    real : RealImages

    Returns
    -------
    float
        The loss of the images as they were before the step.
    """
    device = backbone.device
    if run_config.count_levels_at(state.step) > len(state.levels):
        state.levels = add_pyramid_level(state.levels, run_config, device)
        state.adam = init_adam(state.levels)
    count = run_config.image_count * run_config.views
    views = draw_step_augmentation(run_config, state.step, 2 * count)
    weight = draw_head(run_config, backbone.card.features, state.step, device)

    rows = select_batch_rows(run_config.seed, state.step, len(real.labels), count)
    with torch.no_grad():
        pixels = real.batch(rows, device)
        real_features = backbone.features(
            augment(pixels, views.select_views(slice(count, 2 * count)), run_config.image_size)
        )
        target = compute_head_gradient(real_features, torch.from_numpy(real.labels[rows]).to(device), weight)

    synthetic = augment(
        decode_pyramid(state.levels, run_config.canvas_pixels, run_config.color_decorrelation),
        views.select_views(slice(0, count)),
        run_config.image_size,
    )
    labels = torch.arange(len(run_config.classes), device=device).repeat_interleave(
        run_config.ipc * run_config.views
    )
    loss = lgm_loss(backbone.features(synthetic), labels, target, weight)
    gradients = compute_level_gradients(loss, state.levels)
    adam_step(state.levels, state.adam, run_config.learning_rate, slice(None), gradients)
    state.adam.step_count += 1
    state.step += 1
    return loss.item()
