"""The modes of evaluation: what each trains, on which views."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfm.eval.accuracy import Heads
from sfm.eval.config import EvaluateConfig, Mode, views_of
from sfm.eval.images import ImageSet
from sfm.eval.inherit import Projectors, inherited_heads, train_projectors
from sfm.eval.joint import Chain, train_joint, train_stage
from sfm.eval.kd import soft_labels, train_from_teacher
from sfm.eval.part import Part
from sfm.eval.probe import DEVIATION, train_heads
from sfm.eval.ridge import Ridge, fit_projector
from sfm.eval.subjects import Subject
from sfm.eval.training import Plan, Purpose, Told, lay_out, normal
from sfm.events import Progress, ProgressCallback

SEEN_BY_BOTH: frozenset[Mode] = frozenset({"inherit", "inherit-ridge", "kd"})
"""Modes that need the features of the distillation backbone too."""


@dataclass(frozen=True)
class Ground:
    """What a mode can draw on.

    Attributes
    ----------
    subject : Subject
        The evaluation backbone and its statistics.
    source : Part
        The statistics distilled from; their classifier is inherited.
    images : ImageSet
    pool : Tensor, shape (image, view, feature)
        Features of the evaluation backbone.
    targets : Tensor or None, shape (image, view, target feature)
        Features of the distillation backbone, of the same views; None unless a mode of ``SEEN_BY_BOTH`` was
        asked for.
    """

    subject: Subject
    source: Part
    images: ImageSet
    pool: Tensor
    targets: Tensor | None

    @property
    def spec(self) -> str:
        """The evaluation backbone's."""
        return self.subject.backbone.card.spec

    @property
    def classifier(self) -> Heads:
        """The classifier to inherit."""
        return full_data_head(self.source, self.pool.device)

    @property
    def labels(self) -> Tensor:
        """Class of every image."""
        return torch.from_numpy(self.images.images.labels).to(self.pool.device)

    def seen_by_both(self) -> Tensor:
        """Return the targets where a mode cannot do without them."""
        if self.targets is None:
            raise ValueError("no features of the distillation backbone were computed")
        return self.targets


@dataclass(frozen=True)
class Trained:
    """What a mode trained.

    Attributes
    ----------
    heads : Heads
        Of the evaluation backbone's feature space, projectors included.
    projectors : Projectors or None
        Those alone, where the mode has any.
    penalty : float or None
        Of projectors in closed form.
    """

    heads: Heads
    projectors: Projectors | None = None
    penalty: float | None = None


def train(mode: Mode, ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Train what a mode trains, all seeds at once.

    Parameters
    ----------
    mode : Mode
    ground : Ground
    config : EvaluateConfig
    progress : Listener

    Returns
    -------
    Trained
        One classifier per seed; one in all where nothing is random.
    """
    return METHODS[mode](ground, config, progress)


def linear(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Train fresh heads on the views of images; seeds that share an image share none of its views."""
    own, labels = own_views(ground.pool, ground.images, config), own_labels(ground)
    told = telling(progress, f"linear heads of {ground.images.name} images on {ground.spec}", "epochs")
    plan = own_plan(ground.images, len(own), config)
    return Trained(train_heads(own, labels, plan, fresh_weights(ground, config), told))


def kd(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Train fresh heads from labels and from what the inherited classifier says of the same views."""
    own, labels = own_views(ground.pool, ground.images, config), own_labels(ground)
    soft = soft_labels(own_views(ground.seen_by_both(), ground.images, config), ground.classifier)
    told = telling(progress, f"kd heads on {ground.spec}", "epochs")
    plan = own_plan(ground.images, len(own), config)
    return Trained(train_from_teacher(own, labels, soft, plan, fresh_weights(ground, config), told))


def inherit(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Train projectors to the distillation backbone, and put its classifier behind."""
    pool, targets, plan = shared_views(ground, config)
    names = f"{ground.spec} to {ground.source.entry.backbone.spec}"
    told = telling(progress, f"projectors from {names}", "blocks")
    projectors = train_projectors(pool, targets, plan, told)
    return Trained(inherited_heads(projectors, ground.classifier), projectors)


def inherit_ridge(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Fit one projector to the distillation backbone in closed form; a group is the views of one image."""
    pool, targets, _ = shared_views(ground, config)
    return composed(fit_projector(pool, targets, ground.classifier), ground)


def inherit_statistics(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Fit one projector to the class means of the two backbones, without any image; a group is a class."""
    seen = (ground.subject.part.read("train/count") > 0) & (ground.source.read("train/count") > 0)
    means, targets = (
        torch.from_numpy(part.read("train/mean")[seen]).to(ground.pool.device)
        for part in (ground.subject.part, ground.source)
    )
    return composed(
        fit_projector(means[:, None].float(), targets[:, None].float(), ground.classifier), ground
    )


def joint(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Train projectors and heads together, on cross-entropy."""
    told = telling(progress, f"projectors and heads on {ground.spec}, together", "epochs")
    plan = shared_plan(len(ground.pool), "joint", config)
    return chained(train_joint(ground.pool, ground.labels, ground.classifier, plan, told))


def stage(ground: Ground, config: EvaluateConfig, progress: ProgressCallback) -> Trained:
    """Train projectors, then heads, on cross-entropy."""
    told = telling(progress, f"projectors, then heads on {ground.spec}", "epochs")
    plan = shared_plan(len(ground.pool), "stage", config)
    return chained(train_stage(ground.pool, ground.labels, ground.classifier, plan, told))


METHODS: dict[Mode, Callable[[Ground, EvaluateConfig, ProgressCallback], Trained]] = {
    "linear": linear,
    "inherit": inherit,
    "inherit-ridge": inherit_ridge,
    "inherit-statistics": inherit_statistics,
    "kd": kd,
    "joint": joint,
    "stage": stage,
}


def composed(ridge: Ridge, ground: Ground) -> Trained:
    """Put the inherited classifier behind a projector in closed form."""
    return Trained(inherited_heads(ridge.projectors, ground.classifier), ridge.projectors, ridge.penalty)


def chained(chain: Chain) -> Trained:
    """Compose projectors with the heads trained behind them."""
    return Trained(inherited_heads(chain.projectors, chain.heads), chain.projectors)


def own_views(pool: Tensor, images: ImageSet, config: EvaluateConfig) -> Tensor:
    """Deal the views of an image out to the seeds that share it.

    Returns
    -------
    Tensor, shape (image * seeds that share one, view, feature)
        Rows count images first, then the seeds that share one.
    """
    return pool[:, : images.sharing * config.views].reshape(-1, config.views, pool.shape[2])


def own_labels(ground: Ground) -> Tensor:
    """Return the class of every row of :func:`own_views`."""
    return ground.labels.repeat_interleave(ground.images.sharing)


def own_plan(images: ImageSet, rows: int, config: EvaluateConfig) -> Plan:
    """Lay out a training in which every seed sees its own rows of :func:`own_views`."""
    by_seed = np.arange(rows).reshape(config.seeds // images.sharing, -1, images.sharing)
    return lay_out(
        config.seed,
        by_seed.transpose(0, 2, 1).reshape(config.seeds, -1),
        epochs=config.epochs,
        views=config.views,
    )


def fresh_weights(ground: Ground, config: EvaluateConfig) -> Tensor:
    """Draw the initial weights of heads, shape (seed, class, feature)."""
    shape = (config.seeds, int(ground.labels.max()) + 1, ground.pool.shape[2])
    return normal(config.seed, Purpose.HEAD, shape, DEVIATION)


def shared_views(ground: Ground, config: EvaluateConfig) -> tuple[Tensor, Tensor, Plan]:
    """Return what all seeds look at through both backbones, and in which order."""
    views = views_of(config, "inherit", len(ground.pool))
    plan = shared_plan(len(ground.pool), "inherit", config)
    return ground.pool[:, :views], ground.seen_by_both()[:, :views], plan


def shared_plan(images: int, mode: Mode, config: EvaluateConfig) -> Plan:
    """Lay out a training in which all seeds see the same views, each in its own order."""
    rows = np.tile(np.arange(images), (config.seeds, 1))
    return lay_out(config.seed, rows, epochs=config.epochs, views=views_of(config, mode, images))


def full_data_head(part: Part, device: torch.device) -> Heads:
    """Read the linear classifier of all real training data."""
    weight = torch.from_numpy(part.read("classifier/weight"))
    bias = torch.from_numpy(part.read("classifier/bias"))
    return Heads(weight[None].to(device), bias[None].to(device))


def telling(progress: ProgressCallback, stage: str, unit: str) -> Told:
    """Turn "so much of so much is done" into progress of a stage."""
    return lambda done, total: progress(Progress(stage, done, total, unit))
