"""Gradients in float64 on real weights; ``test_process_group`` starts this as two processes."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from resolved_run import make_resolved_config
from safetensors.torch import save_file

from sfm.backbones.build import load_backbone
from sfm.distill.adam import init_adam
from sfm.distill.augment import draw_augmentation
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.process_group import ProcessGroup, init_process_group, read_distributed_env
from sfm.distill.pyramid import append_noise_level_and_rescale, compute_canvas_size, list_level_resolutions
from sfm.distill.train_step import (
    DistillState,
    FeatureState,
    ImageBatch,
    LossTerm,
    MicroBatching,
    compute_gradients,
    compute_joint_gradients,
)

CLASSES, IPC, VIEWS, SIZE = 5, 2, 2, 32


def gradients(group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Return losses, gradients and features: whole, in micro-batches, in one pass, of two backbones."""
    single = load_backbone("lite0", image_size=SIZE, device="cpu")
    backbone = replace(single, model=copy.deepcopy(single.model).double())
    canvas = compute_canvas_size(SIZE)
    levels: list[torch.Tensor] = []
    for resolution in list_level_resolutions(canvas):
        rows = group.get_own_row_slice(CLASSES, IPC)
        levels = append_noise_level_and_rescale(levels, resolution, CLASSES * IPC, 3, backbone.device, rows)
    levels = [level.detach().double().requires_grad_() for level in levels]
    augmentation = draw_augmentation(3, 7, CLASSES * IPC * VIEWS, canvas)
    augmentation = augmentation.select_views(group.get_own_row_slice(CLASSES, IPC * VIEWS))
    batch = ImageBatch(levels, canvas, SIZE, augmentation, (CLASSES, IPC, VIEWS), group)

    generator = torch.Generator().manual_seed(1)
    means = torch.rand(CLASSES, backbone.card.features, dtype=torch.float64, generator=generator)
    target = compute_flow(means[:, None].repeat(1, IPC, 1), means)
    found: dict[str, torch.Tensor] = {}

    def take(part: slice, values: list[torch.Tensor]) -> None:
        for level, value in zip(whole, values, strict=True):
            level[part] = value

    seen = None
    for name, micro_batch, gradient in (
        ("whole", 10, "exact"),
        ("exact", 3, "exact"),
        ("one", 3, "one-pass"),
    ):
        cut = MicroBatching(micro_batch, gradient, 3)
        whole = [torch.empty_like(level) for level in batch.levels]
        loss, seen = compute_gradients(batch, backbone, lambda some: sfm_loss(some, target), cut, seen, take)
        found |= {f"{name}/loss": torch.tensor(loss), f"{name}/features": seen.clone()}
        found |= {f"{name}/{level}": part for level, part in enumerate(whole)}

    # Two terms of the loss, at the average of the features over this step and one before.
    config = make_resolved_config(
        classes=CLASSES, ipc=IPC, views=VIEWS, micro_batch=3, graphs=3, feature_decay=0.5
    )
    terms = [
        LossTerm(backbone, lambda some: sfm_loss(some, target)),
        LossTerm(backbone, lambda some: sfm_loss(some, target.flip(0)), 0.5),
    ]
    averages = [FeatureState(average=seen.view(CLASSES * IPC, VIEWS, -1).mean(1)) for _ in terms]
    state = DistillState(1, list(batch.levels), replace(init_adam(batch.levels), step_count=1), averages)
    whole = [torch.empty_like(level) for level in batch.levels]
    loss, after = compute_joint_gradients(batch, config, terms, state, take)
    assert after[1].average is not None
    found |= {"joint/loss": torch.tensor(loss), "joint/features": after[1].average}
    found |= {f"joint/{level}": part for level, part in enumerate(whole)}
    return found


if __name__ == "__main__":
    with init_process_group(read_distributed_env(), "cpu") as here:
        save_file(gradients(here), Path(sys.argv[1]) / f"{here.rank}.safetensors")
