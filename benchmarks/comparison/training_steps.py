"""Training steps that are compared: ours, LGM's, published SFM's, and the backbone alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import lgm, published
from torch import Tensor

from sfm.api import DistillConfig
from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.determinism import deterministic_algorithms, tf32_disabled
from sfm.backbones.execution.preparation import count_cuda_graph_bytes, optimize_backbone
from sfm.distill.activation_memory import measure_activation_bytes_per_view, measure_free_memory_bytes
from sfm.distill.adam import init_adam
from sfm.distill.augment import PUBLISHED_NOISY_SHARE
from sfm.distill.config_resolution import resolve_distill_config
from sfm.distill.execution_choice import choose_execution
from sfm.distill.flow import compute_flow, sfm_loss
from sfm.distill.mixed_precision import BFloat16AutocastModel, Precision, convert_precision
from sfm.distill.pyramid import list_level_resolutions
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import DistillState, LossTerm, add_pyramid_level, train_step
from sfm.pipeline.sources import open_source

LGM_VIEWS = 10
PEER_AUGMENTATION = {"crop_edge": "zero", "noisy_views": PUBLISHED_NOISY_SHARE}
"""Fields of the resolved config for views as the published code draws them."""
"""Crops of the other methods, as in their published code: those that are larger than the image show zeros."""

BUILTIN = "builtin:fashion-mnist-6k"

SFM_STEPS = ("ours, default", "ours, whole batch", "ours, exact, forward twice")
PUBLISHED, LGM = "published SFM", f"LGM, {LGM_VIEWS} views"
BARE, BARE_LGM = "bare, ours", "bare, LGM's"
STEP_NAMES = (BARE, *SFM_STEPS, PUBLISHED, LGM, BARE_LGM)

MAX_MEMORY_FRACTION = 0.8
"""Largest share of the free memory that a step may need: times on a swapping machine mean nothing."""


@dataclass(frozen=True)
class StepCase:
    """The problem that a step is measured on.

    Attributes
    ----------
    backbone : str
        Spec from the command line; may be ``random/MODEL``.
    spec : str
        Spec for :func:`load_backbone`.
    image_size : int
        In pixels.
    classes : int
    precision : {"float32", "bf16"}
        Of every step's forward passes.
    """

    backbone: str
    spec: str
    image_size: int
    classes: int
    precision: Precision = "float32"

    def __str__(self) -> str:
        """Return a description for progress lines."""
        mixed = "" if self.precision == "float32" else f" in {self.precision}"
        return f"{self.backbone}{mixed}, {self.image_size} px, {self.classes:,} classes"

    def labels(self) -> dict[str, Any]:
        """Return the keys that identify the case in a row of the results."""
        return {
            "backbone": self.backbone,
            "precision": self.precision,
            "image_size": self.image_size,
            "classes": self.classes,
        }

    def load(self, device: str) -> Backbone:
        """Load the backbone in the precision of the case."""
        backbone = load_backbone(self.spec, image_size=self.image_size, device=device)
        return convert_precision(backbone, self.precision)


def make_default_run_config(case: StepCase, backbone: Backbone) -> ResolvedDistillConfig:
    """Return the resolved config of `sfm distill`, but with a pyramid level per step."""
    config = DistillConfig(store="none", backbone=case.spec, dataset="none", out=Path("none"), grow_every=1)
    return resolve_distill_config(config, [""], [str(index) for index in range(case.classes)], [backbone])


def init_full_pyramid(run_config: ResolvedDistillConfig, device: torch.device) -> DistillState:
    """Return a state whose pyramids have all their levels."""
    levels: list[Tensor] = []
    for _ in list_level_resolutions(run_config.canvas_pixels):
        levels = add_pyramid_level(levels, run_config, device)
    return DistillState(len(levels), levels, init_adam(levels))


def make_bare_step(backbone: Backbone, images: int, forward_only: int = 0) -> Callable[[], object]:
    """Return a function that runs the backbone alone, forward and backward to its input, on noise.

    Parameters
    ----------
    backbone : Backbone
    images : int
        Number of images that go forward and backward.
    forward_only : int
        Number of further images that only go forward.
    """
    size, device = backbone.card.preprocessing.input_size, backbone.device

    def draw_noise(count: int) -> Tensor:
        return torch.randn(count, 3, size, size, device=device).contiguous(
            memory_format=backbone.memory_format
        )

    batch, forward_batch = draw_noise(images).requires_grad_(), draw_noise(forward_only)
    weights = torch.randn(images, backbone.card.features, device=device)

    def step() -> None:
        if forward_only:
            with torch.no_grad():
                backbone.model(forward_batch)
        torch.autograd.grad((backbone.model(batch) * weights).sum(), batch)

    return step


def make_step_run_config(name: str, run_config: ResolvedDistillConfig) -> ResolvedDistillConfig:
    """Return the config of one of :data:`SFM_STEPS`.

    The default step keeps the default config; the second has all images in one graph; the third goes forward
    twice, in micro-batches of half of the images at most, and keeps the graph of one.
    """
    if name == SFM_STEPS[1]:
        return run_config.model_copy(
            update={"micro_batch": run_config.image_count, "graphs": run_config.image_count}
        )
    if name == SFM_STEPS[2]:
        return run_config.model_copy(
            update={
                "micro_batch": min(run_config.micro_batch, max(1, run_config.image_count // 2)),
                "graphs": 0,
            }
        )
    return run_config


def drop_duplicate_steps(names: Sequence[str], run_config: ResolvedDistillConfig) -> list[str]:
    """Return the names without those of :data:`SFM_STEPS` whose config an earlier one has."""
    run_configs = {name: make_step_run_config(name, run_config) for name in SFM_STEPS}
    first = {
        name: next(other for other in SFM_STEPS if run_configs[other] == run_configs[name])
        for name in SFM_STEPS
    }
    return [name for name in names if first.get(name, name) == name]


def make_training_step(name: str, case: StepCase, backbone: Backbone) -> tuple[Callable[[], object], int]:
    """Return a function that runs the next step, and the bytes that its CUDA graphs hold."""
    if name in SFM_STEPS:
        return make_sfm_step(name, case, backbone)
    peer_step = make_peer_step(name, case, backbone)

    def step() -> object:
        with tf32_disabled():
            return peer_step()

    return step, 0


def make_sfm_step(name: str, case: StepCase, backbone: Backbone) -> tuple[Callable[[], object], int]:
    """Return a step of `sfm distill`, and the bytes that its CUDA graphs hold."""
    device = backbone.device
    run_config = make_default_run_config(case, optimize_backbone(backbone, 1, "input-grad")[0])
    run_config = make_step_run_config(name, run_config)
    with tf32_disabled(), deterministic_algorithms(device):
        mode = choose_execution(run_config, "auto", "auto", device).mode
        quick, _ = optimize_backbone(backbone, run_config.micro_batch * run_config.views, mode)
    state, means = init_full_pyramid(run_config, device), draw_class_means(case, backbone)
    objective = partial(sfm_loss, target_flow=compute_flow(means, means))

    def step() -> object:
        with tf32_disabled(), deterministic_algorithms(device):
            return train_step(state, run_config, [LossTerm(quick, objective)])

    return step, count_cuda_graph_bytes(quick)


def draw_class_means(case: StepCase, backbone: Backbone) -> Tensor:
    """Return random class means, shape (C, D)."""
    means = torch.randn(case.classes, backbone.card.features, generator=torch.Generator().manual_seed(0))
    return means.to(backbone.device)


def make_peer_step(name: str, case: StepCase, backbone: Backbone) -> Callable[[], object]:
    """Return a step of LGM, of published SFM, or of the backbone alone."""
    device = backbone.device
    run_config = make_default_run_config(case, optimize_backbone(backbone, 1, "input-grad")[0])
    run_config = run_config.model_copy(update=PEER_AUGMENTATION)
    if name == BARE:
        return make_bare_step(backbone, run_config.image_count)
    if name == BARE_LGM:
        return make_bare_step(
            backbone, LGM_VIEWS * run_config.image_count, LGM_VIEWS * run_config.image_count
        )
    if name == LGM:
        run_config = run_config.model_copy(update={"views": LGM_VIEWS})
        real = load_real_batches(backbone, run_config)
        return partial(lgm.run_lgm_step, init_full_pyramid(run_config, device), run_config, backbone, real)
    trainable = load_trainable_backbone(case, backbone)
    full = init_full_pyramid(run_config, device)
    state = published.PublishedState(full.step, full.levels, published.make_adam(full.levels, run_config))
    # torch makes the optimizer state in the first step, which changes nothing here; ours is there already.
    for level in state.levels:
        level.grad = torch.zeros_like(level)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return partial(
        published.run_published_step, state, run_config, trainable, draw_class_means(case, backbone)
    )


def load_trainable_backbone(case: StepCase, backbone: Backbone) -> Backbone:
    """Return the backbone as the published code has it; for bf16, under autocast."""
    trainable = published.make_trainable_backbone(case.spec, backbone)
    return (
        trainable
        if case.precision == "float32"
        else replace(trainable, model=BFloat16AutocastModel(trainable.model))
    )


def load_real_batches(backbone: Backbone, run_config: ResolvedDistillConfig) -> lgm.RealImages:
    """Return real images for three batches of LGM, labelled with as many classes as the config has."""
    source = open_source(BUILTIN)
    count = 3 * run_config.image_count * run_config.views
    rows = np.arange(min(count, 600))
    images = lgm.decode_real_images(source, rows, backbone, run_config.canvas_pixels).pixels
    real = lgm.RealImages(images[np.arange(count) % len(rows)], np.arange(count) % len(run_config.classes))
    real.batch(np.zeros(0, dtype=np.int64), backbone.device)
    return real


def estimate_graph_bytes(name: str, case: StepCase, backbone: Backbone) -> int:
    """Return the estimated size of a step's autograd graph, from that of one view."""
    optimized = optimize_backbone(backbone, 1, "input-grad")[0]
    run_config = make_default_run_config(case, optimized)
    if name in SFM_STEPS:
        run_config = make_step_run_config(name, run_config)
        return max(run_config.micro_batch, run_config.graphs) * measure_activation_bytes_per_view(optimized)
    if name == PUBLISHED:
        return run_config.image_count * measure_activation_bytes_per_view(
            load_trainable_backbone(case, backbone)
        )
    return (
        (1 if name == BARE else LGM_VIEWS)
        * run_config.image_count
        * measure_activation_bytes_per_view(backbone)
    )


def find_oversized_steps(names: Sequence[str], case: StepCase, backbone: Backbone) -> dict[str, int]:
    """Return the estimated bytes of the steps that do not fit into the free memory.

    On a GPU our step holds its graph between calls, so that others must fit beside it.
    """
    free = MAX_MEMORY_FRACTION * measure_free_memory_bytes(backbone.device)
    copies = 2 if backbone.device.type == "cuda" else 1
    sizes = {name: estimate_graph_bytes(name, case, backbone) for name in names}
    return {name: size for name, size in sizes.items() if size * (copies if name in SFM_STEPS else 1) > free}
