"""Resolve what a config leaves open, by the free memory, the device and the number of steps."""

from collections.abc import Sequence

import torch

from sfm.backbones.build import Backbone
from sfm.distill.activation_memory import (
    choose_kept_graph_image_count,
    choose_micro_batch_size,
    measure_activation_bytes_per_view,
    measure_free_memory_bytes,
)
from sfm.distill.config import DistillConfig
from sfm.distill.execution_choice import choose_execution, require_resumable_execution_option
from sfm.distill.objective import OBJECTIVES
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.pyramid import compute_canvas_size, list_level_resolutions
from sfm.distill.resolved_config import (
    MatchedBackbone,
    ResolvedDistillConfig,
    choose_growth_interval,
    count_first_levels,
)
from sfm.distill.train_step import MicroBatching
from sfm.errors import InputError

COPIED_FIELDS = (
    *("objective", "alpha", "ipc", "centres", "views", "steps", "learning_rate", "seed"),
    *("gradient", "precision", "parametrization", "first_resolution", "start", "color_decorrelation"),
    *("augmentation", "crop_edge"),
)
"""Fields of a config that a resolved one has as they are."""


DEFAULT_FINAL_RATE, DEFAULT_NOISY_VIEWS = 0.05, 0.0


def resolve_versioned_defaults(
    config: DistillConfig, resume_from: ResolvedDistillConfig | None
) -> dict[str, float]:
    """Return the values of options whose defaults are not those of version 0.1.0, by name.

    A run that is resumed keeps its own where none are given: it may have begun with other defaults.
    """
    defaults = {
        "feature_decay": OBJECTIVES[config.objective].default_feature_decay,
        "final_rate": DEFAULT_FINAL_RATE,
        "noisy_views": DEFAULT_NOISY_VIEWS,
    }
    if resume_from:
        defaults = {name: getattr(resume_from, name) for name in defaults}
    given = {name: getattr(config, name) for name in defaults}
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def resolve_distill_config(
    config: DistillConfig,
    entry_digests: Sequence[str],
    class_ids: list[str],
    backbones: Sequence[Backbone],
    group: ProcessGroup = SINGLE_PROCESS,
    resume_from: ResolvedDistillConfig | None = None,
) -> ResolvedDistillConfig:
    """Resolve the unset options of a config by the free memory, the device and the number of steps.

    Parameters
    ----------
    config : DistillConfig
    entry_digests : sequence of str
        Of the entry of each backbone.
    class_ids : list of str
        Classes to distil.
    backbones : sequence of Backbone
        In their precision; the activations of one forward pass of each are measured.
    group : ProcessGroup
        All its processes get the same result.
    resume_from : ResolvedDistillConfig, optional
        Config of a saved run, whose micro-batch, graphs, threads and execution modes are kept.

    Raises
    ------
    InputError
        If there are more processes than classes, the pyramid is to begin above the images' size, or a
        backbone is to be compiled and cannot be.
    """
    if group.size > len(class_ids):
        raise InputError(
            f"{len(class_ids)} classes cannot be shared among {group.size} processes: use fewer --devices"
        )
    first, *further = (
        MatchedBackbone(
            dataset=digest,
            backbone=backbone.card.hash,
            image_size=backbone.card.preprocessing.input_size,
            weight=weight,
        )
        for digest, backbone, weight in zip(
            entry_digests, backbones, config.weight_of_each_backbone, strict=True
        )
    )
    canvas_pixels = config.canvas_pixels or compute_canvas_size(
        max(each.image_size for each in (first, *further))
    )
    if config.first_resolution > canvas_pixels:
        raise InputError(
            f"--first-resolution {config.first_resolution} is larger than the images: give at most "
            f"{canvas_pixels}, or a larger --canvas-pixels"
        )
    levels = list_level_resolutions(canvas_pixels, config.parametrization)
    stages = len(levels) + 1 - count_first_levels(levels, config.first_resolution)
    batching = choose_micro_batching(config, len(class_ids), backbones, group, resume_from)
    resolved = ResolvedDistillConfig(
        **{name: getattr(config, name) for name in COPIED_FIELDS},
        **first.model_dump(exclude={"execution"}),
        classes=class_ids,
        further_backbones=further,
        **resolve_versioned_defaults(config, resume_from),
        grow_every=config.grow_every or choose_growth_interval(config.steps, stages),
        canvas_pixels=canvas_pixels,
        micro_batch=batching.micro_batch_size,
        graphs=batching.kept_graph_image_count,
        device=backbones[0].device.type,
        devices=group.size,
        threads=config.threads or (resume_from.threads if resume_from else torch.get_num_threads()),
    )
    return resolve_execution(resolved, config, backbones[0].device, group, resume_from)


def choose_micro_batching(
    config: DistillConfig,
    class_count: int,
    backbones: Sequence[Backbone],
    group: ProcessGroup,
    resume_from: ResolvedDistillConfig | None,
) -> MicroBatching:
    """Return the micro-batches: as given or saved, else as the backbone of most activations allows."""
    images = group.count_rows_per_process(class_count, config.ipc)[0]
    micro_batch, graphs = config.micro_batch, config.graphs
    if resume_from:
        micro_batch = micro_batch or resume_from.micro_batch
        graphs = resume_from.graphs if graphs is None else graphs
    if micro_batch is None or graphs is None:
        device = backbones[0].device
        view_bytes = max(map(measure_activation_bytes_per_view, backbones))
        # Processes on one CPU see the same free memory.
        free = measure_free_memory_bytes(device) // (1 if device.type == "cuda" else group.size)
        memory = (images, config.views, view_bytes, free, device.type)
        # The process with the least free memory decides for all.
        micro_batch = micro_batch or -group.all_reduce_max(-choose_micro_batch_size(*memory))
        graphs = -group.all_reduce_max(-choose_kept_graph_image_count(*memory)) if graphs is None else graphs
    return MicroBatching(min(micro_batch, images), config.gradient, min(graphs, images))


def resolve_execution(
    resolved: ResolvedDistillConfig,
    config: DistillConfig,
    device: torch.device,
    group: ProcessGroup,
    resume_from: ResolvedDistillConfig | None,
) -> ResolvedDistillConfig:
    """Return the config with the execution mode of a new run, which all backbones share, or those saved.

    Raises
    ------
    InputError
        See :func:`choose_execution` and :func:`require_resumable_execution_option`.
    """
    count = len(resolved.matched_backbones)
    if resume_from is None:
        execution = choose_execution(resolved, config.execution, config.compile, device, group)
        return resolved.with_executions([execution] * count)
    require_resumable_execution_option(resume_from, config.execution)
    saved = [each.execution for each in resume_from.matched_backbones]
    # A run of other backbones is refused when the configs are compared.
    update = {
        "repeatable": resume_from.repeatable,
        "threads_before": resume_from.with_threads(resolved.threads).threads_before,
    }
    return resolved.with_executions((saved * count)[:count]).model_copy(update=update)
