"""The step of SFM as its authors published it (arXiv 2602.05391), re-created in our own words.

What makes it slower and larger than it need be is kept, because that is what is measured: all images in
one graph; parameters that require gradients, which every step computes and adds up, and nobody uses; batch
norms apart from their convolutions, as timm builds the model; every level of the pyramid blown up to full
size before they are added; views by ``grid_sample``; an Adam that is not fused. In one thing it is better off
than published: images and weights are laid out in memory as suits the backbone, which saves it a third of its
time on a CPU.

With several images per class the mean of the *others* is taken over all other images, N - 1 of them, whatever
their class, where the real flow has the mean over C - 1 classes. This is kept too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sfm.backbones.build import Backbone, FeatureModel, _load_model
from sfm.backbones.spec import PROJECTED, parse_spec
from sfm.distill.augment import NOISE_MEAN, NOISE_STD, Views, draw_views
from sfm.distill.engine import Plan, grown
from sfm.distill.flow import flow
from sfm.distill.pyramid import colour_matrix


def published_backbone(spec: str, backbone: Backbone) -> Backbone:
    """Return a loaded backbone as the published code has it: as timm builds it, parameters not frozen.

    Parameters
    ----------
    spec : str
        What `backbone` was loaded from.
    backbone : Backbone
        Gives the input size, the mean and the standard deviation.
    """
    parsed = parse_spec(spec)
    model, _ = _load_model(parsed)
    size = backbone.card.preprocessing.input_size
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    trunk = FeatureModel(model, projected=parsed.rule == PROJECTED).eval().requires_grad_(True)
    return replace(backbone, model=trunk.to(backbone.device).to(memory_format=backbone.memory_format))


def published_decode(levels: Sequence[Tensor], canvas: int) -> Tensor:
    """Turn pyramids into images, each level at full size first.

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
    whole = torch.stack([F.interpolate(level, size=(canvas, canvas), mode="bilinear") for level in levels])
    mixed = torch.einsum("oc,nchw->nohw", colour_matrix().to(whole), whole.sum(0))
    return torch.sigmoid(2 * mixed)


def places(
    start: npt.NDArray[np.float64],
    length: npt.NDArray[np.float64],
    size: int,
    out: int,
    mirror: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float64]:
    """Say where along an axis, from -1 to 1, the pixels of views lie: shape (views, out)."""
    at = 2 * (start[:, None] + length[:, None] * ((np.arange(out) + 0.5) / out)) / size - 1
    return at if mirror is None else np.where(mirror[:, None], at[:, ::-1], at)


def published_augment(images: Tensor, views: Views, out: int) -> Tensor:
    """Look at every image through its views, with ``grid_sample``; noise is drawn for all, used for half.

    Parameters
    ----------
    images : Tensor, shape (N, 3, size, size)
        Differentiable.
    views : Views
        Of N * A views, those of the first image first. The noise is torch's own and ignores their seeds.
    out : int
        Side of the views, in pixels.

    Returns
    -------
    Tensor, shape (N * A, 3, out, out)
    """
    crops, size = views.crops, images.shape[-1]
    y = torch.from_numpy(places(crops.top, crops.height, size, out)).to(images)
    x = torch.from_numpy(places(crops.left, crops.width, size, out, crops.flip)).to(images)
    grid = torch.stack([x[:, None, :].expand(-1, out, -1), y[:, :, None].expand(-1, -1, out)], dim=-1)
    every = images.repeat_interleave(len(y) // len(images), dim=0)
    seen = F.grid_sample(every, grid, mode="bilinear", padding_mode="border", align_corners=False)
    noise = NOISE_MEAN + NOISE_STD * torch.randn_like(seen)
    share = torch.from_numpy(views.noisy).to(seen)[:, None, None, None]
    return seen + share * noise


def published_loss(features: Tensor, means: Tensor) -> Tensor:
    """Return ``1 - cos`` of the real and the synthetic flow.

    Parameters
    ----------
    features : Tensor, shape (C, K, D)
        Of the synthetic images; differentiable.
    means : Tensor, shape (C, D)
        Class means of the real data.

    Returns
    -------
    Tensor, shape ()
    """
    classes, ipc, _ = features.shape
    images = features.flatten(0, 1)
    synthetic = (images.sum(0) - images) / (classes * ipc - 1) - images
    real = flow(means, means).repeat_interleave(ipc, dim=0)
    return 1 - F.cosine_similarity(synthetic.flatten(), real.flatten(), dim=0)


@dataclass
class State:
    """Steps done, the pyramids, shapes (N, 3, r, r), and their optimizer."""

    step: int
    levels: list[Tensor]
    optimizer: torch.optim.Adam


def adam(levels: list[Tensor], plan: Plan) -> torch.optim.Adam:
    """Return a fresh optimizer as torch makes it."""
    return torch.optim.Adam(levels, lr=plan.learning_rate)


def advance(state: State, plan: Plan, backbone: Backbone, means: Tensor) -> float:
    """Do one step: `state` moves on by one.

    Parameters
    ----------
    state : State
    plan : Plan
        Its micro-batch and gradient are not looked at.
    backbone : Backbone
        From :func:`published_backbone`.
    means : Tensor, shape (C, D)
        Class means of the real data.

    Returns
    -------
    float
        The loss of the images as they were before the step.
    """
    if plan.levels(state.step) > len(state.levels):
        state.levels = grown(state.levels, plan, backbone.device)
        state.optimizer = adam(state.levels, plan)
    views = draw_views(plan.seed, state.step, plan.images * plan.views, plan.canvas)
    seen = backbone.features(
        published_augment(published_decode(state.levels, plan.canvas), views, plan.image_size)
    )
    loss = published_loss(seen.view(plan.classes, plan.ipc, plan.views, -1).mean(2), means)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    state.step += 1
    return loss.item()
