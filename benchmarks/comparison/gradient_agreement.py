"""Cosines between gradients that should be equal: of micro-batches, and of a GPU and the CPU."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from comparison.training_steps import StepCase, draw_class_means, init_full_pyramid, make_default_run_config
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import deterministic_algorithms, tf32_disabled
from sfm.backbones.execution.preparation import optimize_backbone
from sfm.distill.augment import draw_augmentation
from sfm.distill.execution_choice import MIN_VIEWS_TO_COMPILE, choose_execution
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import ImageBatch, MicroBatching, compute_gradients

N_DRAWS = 20
"""Draws of pyramids and views whose gradients are compared."""


def compute_pyramid_gradient(run_config: ResolvedDistillConfig, case: StepCase, backbone: Backbone) -> Tensor:
    """Return the gradient with respect to untrained pyramids, flat, float64, on the CPU.

    Views have no noise, which a GPU draws differently.
    """
    device = backbone.device
    views = draw_augmentation(run_config.seed, 0, run_config.image_count, run_config.canvas_pixels)
    views = replace(views, is_noisy=np.zeros_like(views.is_noisy))
    levels = init_full_pyramid(run_config, device).levels
    batch = ImageBatch(
        levels, run_config.canvas_pixels, run_config.image_size, views, (len(run_config.classes), 1, 1)
    )
    means = draw_class_means(case, backbone)
    objective = partial(sfm_loss, target_flow=compute_flow(means, means))
    gradients: dict[int, list[Tensor]] = {}
    with tf32_disabled(), deterministic_algorithms(device):
        cut = MicroBatching(run_config.micro_batch, "exact", run_config.graphs)
        compute_gradients(
            batch, backbone, objective, cut, None, lambda part, each: gradients.update({part.start: each})
        )
    parts = [gradients[start] for start in sorted(gradients)]
    full = [torch.cat([part[level] for part in parts]) for level in range(len(levels))]
    return torch.cat([level.flatten() for level in full]).double().cpu()


def compute_gradient_on(case: StepCase, device: str) -> Tensor:
    """Return the gradient of a few images on a device, flat.

    On a GPU it is computed as in `sfm distill`, in two micro-batches that go forward twice; on the CPU in
    float32, with all images at once.
    """
    if device == "cpu":
        case = replace(case, precision="float32")
    backbone = case.load(device)
    run_config = make_default_run_config(case, optimize_backbone(backbone, 1, "input-grad")[0]).model_copy(
        update={"micro_batch": case.classes, "graphs": 0}
    )
    if device != "cpu":
        run_config = run_config.model_copy(update={"micro_batch": math.ceil(case.classes / 2)})
    with tf32_disabled(), deterministic_algorithms(backbone.device):
        long_config = run_config.model_copy(update={"steps": MIN_VIEWS_TO_COMPILE})
        mode = choose_execution(long_config, "auto", "auto", backbone.device).mode
        quick, _ = optimize_backbone(backbone, run_config.micro_batch * run_config.views, mode)
    return compute_pyramid_gradient(run_config, case, quick)


def compute_cosine(vector: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(torch.nn.functional.cosine_similarity(vector, other, dim=0))


def measure_gradient_agreement(case: StepCase, device: str) -> list[dict[str, Any]]:
    """Return cosines between gradients of ten images: of micro-batches and of the whole batch, over draws.

    On a GPU, also the cosine between the gradient there and autograd's on the CPU in float32.
    """
    case = replace(case, classes=min(case.classes, 10))
    rows = []
    if torch.cuda.is_available() and device != "cpu":
        cosine = compute_cosine(compute_gradient_on(case, "cuda"), compute_gradient_on(case, "cpu"))
        rows.append({**case.labels(), "what": "GPU and CPU", "cosines": [cosine]})
    backbone, _ = optimize_backbone(case.load(device), 1, "input-grad")
    run_config = make_default_run_config(case, backbone).model_copy(
        update={"micro_batch": case.classes, "graphs": case.classes}
    )
    run_configs = [run_config.model_copy(update={"seed": seed}) for seed in range(N_DRAWS)]
    expected = [compute_pyramid_gradient(run_config, case, backbone) for run_config in run_configs]
    for size in (1, 3, 5):
        cosines = [
            compute_cosine(
                compute_pyramid_gradient(
                    run_config.model_copy(update={"micro_batch": size, "graphs": 0}), case, backbone
                ),
                gradient,
            )
            for run_config, gradient in zip(run_configs, expected, strict=True)
        ]
        rows.append({**case.labels(), "what": f"{size} at a time and whole batch", "cosines": cosines})
    return rows
