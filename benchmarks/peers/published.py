"""The step of SFM as its authors published it (arXiv 2602.05391), re-created in our own words.

What makes it slower and larger than it need be is kept, because that is what is measured: all images in
one graph; parameters that require gradients, which every step accumulates without use; batch
norms apart from their convolutions, as timm builds the model; every level of the pyramid blown up to full
size before they are added; views by ``grid_sample``; an Adam that is not fused. In one thing it is better off
than published: images and weights are laid out in memory as suits the backbone, which saves it a third of its
time on a CPU.

With several images per class their features are averaged first, so that a class has one flow and all its
images the same gradient. The sum over the other classes is divided by N - 1, the number of images less one,
where the real flow has the mean over C - 1 classes. This is kept too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sfm.backbones.build import Backbone, FeatureModel, _load_model_with_weights_note
from sfm.backbones.spec import PROJECTED, parse_spec
from sfm.distill.augment import NOISE_MEAN, NOISE_STD, AugmentationParameters
from sfm.distill.flow import compute_flow
from sfm.distill.pyramid import make_decorrelated_to_rgb_matrix
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import add_pyramid_level, draw_step_augmentation


def make_trainable_backbone(spec: str, backbone: Backbone) -> Backbone:
    """Return a loaded backbone as the published code has it: as timm builds it, parameters not frozen.

    Parameters
    ----------
    spec : str
        What `backbone` was loaded from.
    backbone : Backbone
        Gives the input size, the mean and the standard deviation.
    """
    parsed = parse_spec(spec)
    model, _ = _load_model_with_weights_note(parsed)
    size = backbone.card.preprocessing.input_size
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    trunk = FeatureModel(model, projected=parsed.feature_rule == PROJECTED).eval().requires_grad_(True)
    return replace(backbone, model=trunk.to(backbone.device).to(memory_format=backbone.memory_format))


def decode_at_full_size(levels: Sequence[Tensor], canvas: int) -> Tensor:
    """Decode pyramids into images; every level is upsampled to full size first.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        Differentiable.
    canvas : int
        Side of the images, in pixels.

    Returns
    -------
    Tensor, shape (N, 3, canvas, canvas)
    """
    full_size = torch.stack(
        [F.interpolate(level, size=(canvas, canvas), mode="bilinear") for level in levels]
    )
    mixed = torch.einsum("oc,nchw->nohw", make_decorrelated_to_rgb_matrix().to(full_size), full_size.sum(0))
    return torch.sigmoid(2 * mixed)


def compute_grid_coordinates(
    start: npt.NDArray[np.float64],
    length: npt.NDArray[np.float64],
    size: int,
    out: int,
    mirror: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float64]:
    """Return the coordinates of view pixels along an axis, from -1 to 1, shape (views, out)."""
    grid = 2 * (start[:, None] + length[:, None] * ((np.arange(out) + 0.5) / out)) / size - 1
    return grid if mirror is None else np.where(mirror[:, None], grid[:, ::-1], grid)


def augment_with_grid_sample(images: Tensor, views: AugmentationParameters, out: int) -> Tensor:
    """Cut the views of every image with ``grid_sample``; noise is drawn for all views and used for half.

    Parameters
    ----------
    images : Tensor, shape (N, 3, size, size)
        Differentiable.
    views : AugmentationParameters
        Of N * A views, those of the first image first. The noise is torch's own and ignores their seeds.
        Where the authors' crops leave the image, views are zero; `crops.edge` says whether these are such.
    out : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (N * A, 3, out, out)
    """
    crops, size = views.crops, images.shape[-1]
    y = torch.from_numpy(compute_grid_coordinates(crops.top, crops.height, size, out)).to(images)
    x = torch.from_numpy(compute_grid_coordinates(crops.left, crops.width, size, out, crops.flip)).to(images)
    grid = torch.stack([x[:, None, :].expand(-1, out, -1), y[:, :, None].expand(-1, -1, out)], dim=-1)
    repeated = images.repeat_interleave(len(y) // len(images), dim=0)
    padding = {"clip": "border", "zero": "zeros"}[crops.edge]
    cut = F.grid_sample(repeated, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    noise = NOISE_MEAN + NOISE_STD * torch.randn_like(cut)
    share = torch.from_numpy(views.is_noisy).to(cut)[:, None, None, None]
    return cut + share * noise


def published_loss(features: Tensor, means: Tensor) -> Tensor:
    """Return ``1 - cos`` of the real and the synthetic flow, one per class.

    Parameters
    ----------
    features : Tensor, shape (C, K, A, D)
        Of the views of synthetic images; differentiable.
    means : Tensor, shape (C, D)
        Class means of the real data.

    Returns
    -------
    Tensor, shape ()
    """
    classes, ipc = features.shape[:2]
    averages = features.mean(dim=(1, 2))
    synthetic = (averages.sum(0) - averages) / (classes * ipc - 1) - averages
    return 1 - F.cosine_similarity(synthetic.flatten(), compute_flow(means, means).flatten(), dim=0)


@dataclass
class PublishedState:
    """Number of steps, pyramids of shapes (N, 3, r, r), and their optimizer."""

    step: int
    levels: list[Tensor]
    optimizer: torch.optim.Adam


def make_adam(levels: list[Tensor], run_config: ResolvedDistillConfig) -> torch.optim.Adam:
    """Return a new optimizer, torch's own."""
    return torch.optim.Adam(levels, lr=run_config.learning_rate)


def run_published_step(
    state: PublishedState, run_config: ResolvedDistillConfig, backbone: Backbone, means: Tensor
) -> float:
    """Run one training step and update `state`.

    Parameters
    ----------
    state : PublishedState
    run_config : ResolvedDistillConfig
        Micro-batch and gradient are not used.
    backbone : Backbone
        From :func:`make_trainable_backbone`.
    means : Tensor, shape (C, D)
        Class means of the real data.

    Returns
    -------
    float
        The loss of the images as they were before the step.
    """
    if run_config.count_levels_at(state.step) > len(state.levels):
        state.levels = add_pyramid_level(state.levels, run_config, backbone.device)
        state.optimizer = make_adam(state.levels, run_config)
    views = draw_step_augmentation(run_config, state.step, run_config.image_count * run_config.views)
    features = backbone.features(
        augment_with_grid_sample(
            decode_at_full_size(state.levels, run_config.canvas_pixels), views, run_config.image_size
        )
    )
    loss = published_loss(features.view(len(run_config.classes), run_config.ipc, run_config.views, -1), means)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    state.step += 1
    return loss.item()
