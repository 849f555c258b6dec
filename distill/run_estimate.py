"""The dry run of a distillation: what it would match, how it would compute, and what it would write."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.distill.backbone_entries import open_entries_and_backbones
from sfm.distill.config import DistillConfig
from sfm.distill.distiller import Distiller
from sfm.distill.process_group import ProcessGroup, read_distributed_env
from sfm.distill.run import find_resumable_checkpoint, read_saved_targets
from sfm.distill.run_checkpoints import require_resumable_config
from sfm.distill.state_dict import list_expected_state_tensors
from sfm.distill.target_estimate import TargetEstimate, estimate_targets
from sfm.events import ProgressCallback, no_progress


@dataclass(frozen=True)
class MatchedBackboneEstimate:
    """A backbone of an estimate.

    Attributes
    ----------
    backbone, backbone_hash, entry_digest : str
    image_size, features : int
        Side of its input in pixels, and length of its features.
    weight : float
        Of its loss.
    mode, reason : str
        Execution mode, and why it was chosen. The run takes another one if this one fails.
    targets : TargetEstimate or None
        What the targets allow; None if the entry holds no scatter within classes to tell it from.
    """

    backbone: str
    backbone_hash: str
    entry_digest: str
    image_size: int
    features: int
    weight: float
    mode: str
    reason: str
    targets: TargetEstimate | None


@dataclass(frozen=True)
class DistillationEstimate:
    """What a distillation would do; the attributes are the keys of ``--dry-run --json``.

    Attributes
    ----------
    dataset, objective : str
    classes, images : int
        Numbers of classes, and of images of all classes.
    canvas : int
        Side of the images, in pixels.
    steps, views : int
        Steps of the run, and views of an image per step.
    feature_decay : float
    micro_batch, graphs : int
        Images whose activations are in memory at once, and whose graphs are kept.
    device, precision : str
    devices, threads : int
        Processes, and CPU threads of each.
    checkpoint_bytes : int
        Size of the last checkpoint; the run keeps two until it ends.
    backbones : list of MatchedBackboneEstimate
    """

    dataset: str
    objective: str
    classes: int
    images: int
    canvas: int
    steps: int
    views: int
    feature_decay: float
    micro_batch: int
    graphs: int
    device: str
    precision: str
    devices: int
    threads: int
    checkpoint_bytes: int
    backbones: list[MatchedBackboneEstimate]


class UnstartedProcessGroup(ProcessGroup):
    """A group of processes that are not started: each is taken to have as much memory as this one."""

    def all_reduce_max(self, value: int) -> int:
        """Return the value."""
        return value

    def broadcast_object(self, value: Any) -> Any:
        """Return the value."""
        return value


def estimate_distillation(
    config: DistillConfig, progress: ProgressCallback = no_progress
) -> DistillationEstimate:
    """Return what a distillation would do; nothing is written.

    Raises
    ------
    InputError
        If the run would be refused before its first step.
    """
    env = read_distributed_env()
    group = UnstartedProcessGroup(0, env.world_size if env else config.devices)
    saved = find_resumable_checkpoint(config.out, config.resume)
    entries, backbones = open_entries_and_backbones(config, progress)
    resume_from = saved[1].config if saved else None
    targets = read_saved_targets(config.out, resume_from, backbones)
    # As `spawn_workers` does: the processes share the threads of this one.
    own_threads = None if env else max(1, torch.get_num_threads() // group.size)
    with limit_cpu_threads(own_threads):
        distiller = Distiller(config, entries, backbones, group, resume_from, targets, progress)
    resolved = distiller.config
    if resume_from:
        require_resumable_config(resume_from, resolved, config.out)
    return DistillationEstimate(
        dataset=entries[0].dataset.name,
        objective=resolved.objective,
        classes=len(resolved.classes),
        images=resolved.image_count,
        canvas=resolved.canvas_pixels,
        steps=resolved.steps,
        views=resolved.views,
        feature_decay=resolved.feature_decay,
        micro_batch=resolved.micro_batch,
        graphs=resolved.graphs,
        device=resolved.device,
        precision=resolved.precision,
        devices=resolved.devices,
        threads=resolved.threads,
        checkpoint_bytes=estimate_checkpoint_bytes(distiller),
        backbones=[
            MatchedBackboneEstimate(
                backbone=backbone.card.spec,
                backbone_hash=matched.backbone,
                entry_digest=matched.dataset,
                image_size=matched.image_size,
                features=backbone.card.features,
                weight=matched.weight,
                mode=matched.execution.mode,
                reason=matched.execution.reason,
                targets=targets,
            )
            for backbone, matched, targets in zip(
                backbones,
                resolved.matched_backbones,
                estimate_targets(entries, distiller.computed_targets, resolved),
                strict=True,
            )
        ],
    )


def estimate_checkpoint_bytes(distiller: Distiller) -> int:
    """Return the size of the tensors of a run's last checkpoint."""
    config = distiller.config
    specs = list_expected_state_tensors(config, config.steps, distiller.feature_counts, distiller.group)
    bytes_per_value = {"F32": 4, "I64": 8}
    return sum(bytes_per_value[dtype] * math.prod(shape) for dtype, shape in specs.values())
