"""The modes of evaluation: the heads or projectors that each trains, and its views."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.eval.config import EvaluateConfig, Mode, count_views_per_image_and_seed, get_projector_init
from sfm.eval.evaluated_backbones import EvaluatedBackbone
from sfm.eval.head_accuracy import LinearHeads, SingleLinearHead
from sfm.eval.image_sets import ImageSet
from sfm.eval.joint_training import train_heads_behind_projectors, train_projectors_with_heads
from sfm.eval.knowledge_distillation import compute_soft_labels, train_heads_on_hard_and_soft_labels
from sfm.eval.linear_probe import INITIAL_STD, train_linear_heads
from sfm.eval.projectors import (
    LinearProjectors,
    compose_projectors_with_classifier,
    init_projectors,
    train_projectors,
)
from sfm.eval.ridge import RidgeFit, fit_ridge_projector
from sfm.eval.soft_label_training import train_heads_on_soft_labels
from sfm.eval.training import (
    BatchSchedule,
    CountCallback,
    RandomStreamPurpose,
    draw_initial_weights_by_seed,
    make_batch_schedule,
)
from sfm.events import Progress, ProgressCallback

TARGET_FEATURE_MODES: frozenset[Mode] = frozenset({"inherit", "inherit-ridge", "kd", "stage"})
"""Modes that need the features of the distillation backbone too."""


@dataclass(frozen=True)
class ModeTrainingContext:
    """The features, labels and statistics that a mode trains from.

    Attributes
    ----------
    eval_backbone : EvaluatedBackbone
        The evaluation backbone and its statistics.
    teacher_statistics : ClassSubsetStatistics
        The statistics distilled from; their classifier is inherited.
    image_set : ImageSet
    view_features : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    target_features : Tensor or None, shape (image, view, target feature)
        Features of the distillation backbone, of the same views; None unless a mode of
        ``TARGET_FEATURE_MODES`` was asked for.
    soft_labels : Tensor or None, shape (image, class)
        None unless the mode is ``soft``.
    """

    eval_backbone: EvaluatedBackbone
    teacher_statistics: ClassSubsetStatistics
    image_set: ImageSet
    view_features: Tensor
    target_features: Tensor | None
    soft_labels: Tensor | None = None

    @property
    def backbone_spec(self) -> str:
        """Spec of the evaluation backbone."""
        return self.eval_backbone.backbone.card.spec

    @property
    def inherited_classifier(self) -> SingleLinearHead:
        """The classifier of all real images on the distillation backbone."""
        return read_full_data_classifier(self.teacher_statistics, self.view_features.device)

    @property
    def labels(self) -> Tensor:
        """Class of every image."""
        return torch.from_numpy(self.image_set.images.labels).to(self.view_features.device)

    def require_target_features(self) -> Tensor:
        """Return the target features; raise ValueError if there are none."""
        if self.target_features is None:
            raise ValueError("no features of the distillation backbone were computed")
        return self.target_features

    def require_soft_labels(self) -> Tensor:
        """Return the soft labels; raise ValueError if there are none."""
        if self.soft_labels is None:
            raise ValueError("no soft labels were given")
        return self.soft_labels


@dataclass(frozen=True)
class FittedHeads:
    """The heads, and projectors, that a mode trained.

    Attributes
    ----------
    heads : LinearHeads
        On features of the evaluation backbone, projectors included.
    projectors : LinearProjectors or None
        The projectors alone, where the mode has any.
    relative_ridge_penalty : float or None
        Of projectors in closed form.
    """

    heads: LinearHeads
    projectors: LinearProjectors | None = None
    relative_ridge_penalty: float | None = None


def fit_heads_by_mode(
    mode: Mode, context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train the heads of a mode, all seeds at once.

    Parameters
    ----------
    mode : Mode
    context : ModeTrainingContext
    config : EvaluateConfig
    progress : ProgressCallback

    Returns
    -------
    FittedHeads
        One head per seed; a single one where nothing is random.
    """
    return MODE_FUNCTIONS[mode](context, config, progress)


def fit_linear_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train fresh heads on the views of images; seeds that share an image share none of its views."""
    seed_views = split_views_between_seeds(context.view_features, context.image_set, config)
    labels = repeat_labels_for_split_views(context)
    stage = f"linear heads of {context.image_set.name} images on {context.backbone_spec}"
    schedule = make_separate_views_schedule(context.image_set, len(seed_views), config)
    weights = draw_initial_head_weights(context, config)
    on_epoch = make_stage_progress_callback(progress, stage, "epochs")
    return FittedHeads(train_linear_heads(seed_views, labels, schedule, weights, on_epoch))


def fit_soft_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train fresh heads as mode ``linear``, on the soft labels of the images."""
    seed_views = split_views_between_seeds(context.view_features, context.image_set, config)
    soft_labels = context.require_soft_labels().repeat_interleave(context.image_set.seeds_per_image, dim=0)
    stage = f"soft heads of {context.image_set.name} images on {context.backbone_spec}"
    schedule = make_separate_views_schedule(context.image_set, len(seed_views), config)
    weights = draw_initial_head_weights(context, config)
    on_epoch = make_stage_progress_callback(progress, stage, "epochs")
    return FittedHeads(train_heads_on_soft_labels(seed_views, soft_labels, schedule, weights, on_epoch))


def fit_kd_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train fresh heads from labels and from the inherited classifier's soft labels of the same views."""
    seed_views = split_views_between_seeds(context.view_features, context.image_set, config)
    labels = repeat_labels_for_split_views(context)
    seed_targets = split_views_between_seeds(context.require_target_features(), context.image_set, config)
    soft_labels = compute_soft_labels(seed_targets, context.inherited_classifier, config.kd_temperature)
    schedule = make_separate_views_schedule(context.image_set, len(seed_views), config)
    weights = draw_initial_head_weights(context, config)
    on_epoch = make_stage_progress_callback(progress, f"kd heads on {context.backbone_spec}", "epochs")
    return FittedHeads(
        train_heads_on_hard_and_soft_labels(
            seed_views,
            labels,
            soft_labels,
            schedule,
            weights,
            config.kd_temperature,
            config.kd_weight,
            on_epoch,
        )
    )


def fit_inherit_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train projectors to the distillation backbone, and compose them with its classifier."""
    projectors = train_inheritance_projectors("inherit", context, config, progress)
    heads = compose_projectors_with_classifier(projectors, context.inherited_classifier)
    return FittedHeads(heads, projectors)


def fit_inherit_ridge_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Fit one projector to the distillation backbone in closed form; a group is the views of one image."""
    view_features, target_features, _ = make_projector_training_data(context, config)
    ridge_fit = fit_ridge_projector(view_features, target_features, context.inherited_classifier)
    return compose_ridge_with_classifier(ridge_fit, context)


def fit_inherit_statistics_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Fit one projector to the class means of the two backbones, without any image; a group is a class."""
    statistics_pair = (context.eval_backbone.statistics, context.teacher_statistics)
    has_samples = np.all(
        [statistics.read_per_class_array("train/count") > 0 for statistics in statistics_pair], axis=0
    )
    means, target_means = (
        torch.from_numpy(statistics.read_per_class_array("train/mean")[has_samples]).to(
            context.view_features.device
        )
        for statistics in statistics_pair
    )
    ridge_fit = fit_ridge_projector(
        means[:, None].float(), target_means[:, None].float(), context.inherited_classifier
    )
    return compose_ridge_with_classifier(ridge_fit, context)


def fit_joint_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train projectors and the inherited classifier together, on cross-entropy."""
    stage = f"projectors and heads on {context.backbone_spec}, together"
    model = train_projectors_with_heads(
        context.view_features,
        context.labels,
        context.inherited_classifier,
        make_initial_projectors("joint", context, config),
        make_shared_views_schedule(len(context.view_features), "joint", config),
        make_stage_progress_callback(progress, stage, "epochs"),
    )
    return FittedHeads(compose_projectors_with_classifier(model.projectors, model.heads), model.projectors)


def fit_stage_mode(
    context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> FittedHeads:
    """Train the projectors of mode ``inherit``, then the inherited classifier behind them on labels."""
    projectors = train_inheritance_projectors("stage", context, config, progress)
    target_space_heads = train_heads_behind_projectors(
        context.view_features,
        context.labels,
        context.inherited_classifier,
        projectors,
        make_shared_views_schedule(len(context.view_features), "stage", config),
        make_stage_progress_callback(
            progress, f"heads behind projectors on {context.backbone_spec}", "epochs"
        ),
    )
    return FittedHeads(compose_projectors_with_classifier(projectors, target_space_heads), projectors)


MODE_FUNCTIONS: dict[Mode, Callable[[ModeTrainingContext, EvaluateConfig, ProgressCallback], FittedHeads]] = {
    "linear": fit_linear_mode,
    "soft": fit_soft_mode,
    "inherit": fit_inherit_mode,
    "inherit-ridge": fit_inherit_ridge_mode,
    "inherit-statistics": fit_inherit_statistics_mode,
    "kd": fit_kd_mode,
    "joint": fit_joint_mode,
    "stage": fit_stage_mode,
}


def compose_ridge_with_classifier(ridge_fit: RidgeFit, context: ModeTrainingContext) -> FittedHeads:
    """Compose a projector in closed form with the inherited classifier."""
    heads = compose_projectors_with_classifier(ridge_fit.projector, context.inherited_classifier)
    return FittedHeads(heads, ridge_fit.projector, ridge_fit.relative_penalty)


def make_initial_projectors(
    mode: Mode, context: ModeTrainingContext, config: EvaluateConfig
) -> LinearProjectors:
    """Return the projectors that a mode starts at, one per seed."""
    projector_init = get_projector_init(config, mode)
    if projector_init is None:
        raise ValueError(f"mode {mode} trains no projector")
    return init_projectors(
        projector_init,
        config.seed,
        config.seeds,
        context.inherited_classifier.weight.shape[2],
        context.view_features.shape[2],
    )


def train_inheritance_projectors(
    mode: Mode, context: ModeTrainingContext, config: EvaluateConfig, progress: ProgressCallback
) -> LinearProjectors:
    """Train projectors to the features of the distillation backbone, for mode ``inherit`` or ``stage``."""
    view_features, target_features, schedule = make_projector_training_data(context, config)
    names = f"{context.backbone_spec} to {context.teacher_statistics.entry.backbone.spec}"
    return train_projectors(
        view_features,
        target_features,
        schedule,
        make_initial_projectors(mode, context, config),
        make_stage_progress_callback(progress, f"projectors from {names}", "blocks"),
    )


def split_views_between_seeds(view_features: Tensor, image_set: ImageSet, config: EvaluateConfig) -> Tensor:
    """Split the views of every image between the seeds that share it.

    Returns
    -------
    Tensor, shape (image * seeds per image, view, feature)
        Images first, then the seeds that share one.
    """
    used_features = view_features[:, : image_set.seeds_per_image * config.views]
    return used_features.reshape(-1, config.views, view_features.shape[2])


def repeat_labels_for_split_views(context: ModeTrainingContext) -> Tensor:
    """Return the class of every row of :func:`split_views_between_seeds`."""
    return context.labels.repeat_interleave(context.image_set.seeds_per_image)


def make_separate_views_schedule(
    image_set: ImageSet, image_seed_pair_count: int, config: EvaluateConfig
) -> BatchSchedule:
    """Return a schedule in which every seed trains on different rows of :func:`split_views_between_seeds`."""
    seeds_per_image = image_set.seeds_per_image
    by_seed = np.arange(image_seed_pair_count).reshape(config.seeds // seeds_per_image, -1, seeds_per_image)
    return make_batch_schedule(
        config.seed,
        by_seed.transpose(0, 2, 1).reshape(config.seeds, -1),
        epoch_count=config.epochs,
        views_per_image=config.views,
    )


def draw_initial_head_weights(context: ModeTrainingContext, config: EvaluateConfig) -> Tensor:
    """Draw the initial weights of heads, shape (seed, class, feature)."""
    shape = (config.seeds, int(context.labels.max()) + 1, context.view_features.shape[2])
    return draw_initial_weights_by_seed(config.seed, RandomStreamPurpose.HEAD, shape, INITIAL_STD)


class ProjectorTrainingData(NamedTuple):
    """What all seeds of mode ``inherit`` train on.

    Attributes
    ----------
    view_features : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    target_features : Tensor, shape (image, view, target feature)
        Features of the distillation backbone, of the same views.
    schedule : BatchSchedule
    """

    view_features: Tensor
    target_features: Tensor
    schedule: BatchSchedule


def make_projector_training_data(
    context: ModeTrainingContext, config: EvaluateConfig
) -> ProjectorTrainingData:
    """Return both backbones' features of the views that all seeds share, and their schedule."""
    views = count_views_per_image_and_seed(config, "inherit", len(context.view_features))
    schedule = make_shared_views_schedule(len(context.view_features), "inherit", config)
    return ProjectorTrainingData(
        context.view_features[:, :views], context.require_target_features()[:, :views], schedule
    )


def make_shared_views_schedule(image_count: int, mode: Mode, config: EvaluateConfig) -> BatchSchedule:
    """Return a schedule in which all seeds train on the same views, each in its own order."""
    image_indices = np.tile(np.arange(image_count), (config.seeds, 1))
    views = count_views_per_image_and_seed(config, mode, image_count)
    return make_batch_schedule(config.seed, image_indices, epoch_count=config.epochs, views_per_image=views)


def read_full_data_classifier(statistics: ClassSubsetStatistics, device: torch.device) -> SingleLinearHead:
    """Read the linear classifier of all real training data."""
    weight = torch.from_numpy(statistics.read_per_class_array("classifier/weight"))
    bias = torch.from_numpy(statistics.read_per_class_array("classifier/bias"))
    return LinearHeads(weight[None].to(device), bias[None].to(device))


def make_stage_progress_callback(progress: ProgressCallback, stage: str, unit: str) -> CountCallback:
    """Return a callback that reports counts as the progress of a stage."""
    return lambda done, total: progress(Progress(stage, done, total, unit))
