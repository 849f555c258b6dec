"""What ``test_group`` starts as two processes: one step of the gradient in float64, on real weights."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sfm.backbones.build import load_backbone
from sfm.distill.augment import draw_views
from sfm.distill.flow import flow, sfm_loss
from sfm.distill.gradient import Batch, Cut, pull
from sfm.distill.group import Group, joined, launched
from sfm.distill.pyramid import canvas_size, grow, resolutions

CLASSES, IPC, VIEWS, SIZE = 5, 2, 2, 32


def gradients(group: Group) -> dict[str, torch.Tensor]:
    """Return losses, gradients and features: of the whole batch, in micro-batches, in one pass."""
    single = load_backbone("lite0", image_size=SIZE, device="cpu")
    backbone = replace(single, model=copy.deepcopy(single.model).double())
    canvas = canvas_size(SIZE)
    levels: list[torch.Tensor] = []
    for resolution in resolutions(canvas):
        share = group.share(CLASSES, IPC)
        levels = grow(levels, resolution, CLASSES * IPC, 3, backbone.device, share)
    levels = [level.detach().double().requires_grad_() for level in levels]
    views = draw_views(3, 7, CLASSES * IPC * VIEWS, canvas).part(group.share(CLASSES, IPC * VIEWS))
    batch = Batch(levels, canvas, SIZE, views, (CLASSES, IPC, VIEWS), group)

    generator = torch.Generator().manual_seed(1)
    means = torch.rand(CLASSES, backbone.card.features, dtype=torch.float64, generator=generator)
    target = flow(means[:, None].repeat(1, IPC, 1), means)
    found: dict[str, torch.Tensor] = {}
    seen = None
    for name, micro_batch, gradient in (
        ("whole", 10, "exact"),
        ("exact", 3, "exact"),
        ("one", 3, "one-pass"),
    ):
        cut = Cut(micro_batch, gradient, 3)
        whole = [torch.empty_like(level) for level in batch.levels]

        def take(part: slice, values: list[torch.Tensor], whole: list[torch.Tensor] = whole) -> None:
            for level, value in zip(whole, values, strict=True):
                level[part] = value

        step = pull(batch, backbone, lambda some: sfm_loss(some, target), cut, seen, take)
        seen = step.features
        found |= {f"{name}/loss": torch.tensor(step.loss), f"{name}/features": seen.clone()}
        found |= {f"{name}/{level}": part for level, part in enumerate(whole)}
    return found


if __name__ == "__main__":
    with joined(launched(), "cpu") as here:
        save_file(gradients(here), Path(sys.argv[1]) / f"{here.rank}.safetensors")
