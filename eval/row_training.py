"""Train and score accuracy rows; finished rows and features are kept so that a command can resume."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.errors import InputError
from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.eval.classifier_files import save_first_seed_classifier
from sfm.eval.config import (
    VIEWS_BY_SEED_MODES,
    EvaluateConfig,
    Mode,
    count_views_per_image_and_seed,
    get_classifier_folder,
    make_row_training_options,
)
from sfm.eval.evaluated_backbones import EvaluatedBackbone, select_matching_or_first_statistics
from sfm.eval.evaluation_job import EvaluationJob
from sfm.eval.image_set_labels import ImageSetLabeller
from sfm.eval.image_sets import ImageSet
from sfm.eval.mode_training import (
    TARGET_FEATURE_MODES,
    ModeTrainingContext,
    fit_heads_by_mode,
    make_stage_progress_callback,
)
from sfm.eval.result import AccuracyRow
from sfm.eval.scores import HeldOutSamples, make_accuracy_row
from sfm.eval.view_features import compute_view_features, draw_view_crops
from sfm.eval.work_folder import WorkFolder, compute_work_key
from sfm.events import ProgressCallback
from sfm.stats_store.digests import compute_array_digest

PROTOCOL_OPTIONS = (
    *("seeds", "epochs", "views", "projector_views", "projector_init", "seed"),
    *("crop_edge", "kd_temperature", "kd_weight"),
)
"""Options that accuracies depend on."""

WriteFailure = str
"""A message about what could not be written."""


@dataclass(frozen=True)
class KeyedViewFeatures:
    """Features of the views of an image set through one backbone.

    Attributes
    ----------
    features : Tensor, shape (image, view, feature)
    work_key : str
        Key of their files in the work folder.
    """

    features: Tensor
    work_key: str


@dataclass(frozen=True)
class RowTrainer:
    """Trains and scores the rows of one run on one backbone.

    Attributes
    ----------
    job : EvaluationJob
    eval_backbone : EvaluatedBackbone
    held_out_samples : HeldOutSamples
    full_data_top1 : float
        Top-1 accuracy of the linear classifier of all real images.
    work_folder : WorkFolder
        Where finished rows are kept.
    progress : ProgressCallback
    labeller : ImageSetLabeller or None
        None unless mode ``soft`` was asked for.
    """

    job: EvaluationJob
    eval_backbone: EvaluatedBackbone
    held_out_samples: HeldOutSamples
    full_data_top1: float
    work_folder: WorkFolder
    progress: ProgressCallback
    labeller: ImageSetLabeller | None = None

    @property
    def teacher_statistics(self) -> ClassSubsetStatistics:
        """The statistics whose classifier is inherited: the backbone's own if it was distilled on."""
        return select_matching_or_first_statistics(
            self.job.all_source_statistics, self.eval_backbone.backbone.card.hash
        )

    def read_or_train_row(
        self,
        image_set: ImageSet,
        mode: Mode,
        compute_shared_features: Callable[[Backbone], KeyedViewFeatures],
        appended_write_failures: list[WriteFailure],
    ) -> AccuracyRow:
        """Return the accuracy row of a mode on an image set; finished rows in the work folder are read.

        Parameters
        ----------
        image_set : ImageSet
        mode : Mode
        compute_shared_features : callable
            Returns the features of the images' views through a backbone, which other rows use too.
        appended_write_failures : list of str
            Messages about files that could not be written are appended.
        """
        config = self.job.config
        key = self.make_row_work_key(image_set, mode)
        finished_row = self.work_folder.read_row_if_intact(key)
        if finished_row is not None:
            return finished_row
        target_features: KeyedViewFeatures | None = None
        view_features = compute_shared_features(self.eval_backbone.backbone)
        if mode in TARGET_FEATURE_MODES:
            target_features = compute_shared_features(
                self.job.get_teacher_backbone(self.eval_backbone.backbone)
            )
        context = ModeTrainingContext(
            self.eval_backbone,
            self.teacher_statistics,
            image_set,
            view_features.features,
            target_features.features if target_features else None,
            self.make_soft_labels_if_used(image_set, mode),
        )
        fitted_heads = fit_heads_by_mode(mode, context, config, self.progress)
        protocol = make_row_training_options(config, mode, len(image_set.images.pixels))
        row = make_accuracy_row(
            self.eval_backbone,
            image_set,
            mode,
            fitted_heads,
            self.held_out_samples,
            self.full_data_top1,
            protocol,
        )
        if mode == "soft" and self.labeller:
            row = row.model_copy(update={"labels": self.labeller.make_label_record()})
        if config.save and image_set.name == "distilled":
            folder = get_classifier_folder(config.result_path)
            try:
                save_first_seed_classifier(
                    folder, fitted_heads, row, self.job.run, self.eval_backbone, self.teacher_statistics
                )
            except InputError as error:
                appended_write_failures.append(str(error))
                return row
        self.work_folder.write_row(key, row, [f.work_key for f in (view_features, target_features) if f])
        return row

    def read_or_train_baseline_rows(
        self, image_set: ImageSet, appended_write_failures: list[WriteFailure]
    ) -> list[AccuracyRow]:
        """Return the rows of real images: mode ``linear``, and ``soft`` if the distilled images have it.

        Parameters as of :meth:`read_or_train_row`.
        """
        modes: list[Mode] = ["linear"]
        if self.labeller and self.labeller.can_label(image_set):
            modes.append("soft")
        computed: list[KeyedViewFeatures] = []

        def compute_features_once(backbone: Backbone) -> KeyedViewFeatures:
            if not computed:
                computed.append(
                    compute_image_set_features(
                        backbone, image_set, modes, self.job.config, self.work_folder, self.progress
                    )
                )
            return computed[0]

        return [
            self.read_or_train_row(image_set, mode, compute_features_once, appended_write_failures)
            for mode in modes
        ]

    def make_soft_labels_if_used(self, image_set: ImageSet, mode: Mode) -> Tensor | None:
        """Return the labels of an image set on the backbone's device, for mode ``soft`` alone."""
        if mode != "soft" or self.labeller is None:
            return None
        return torch.from_numpy(self.labeller.label_images(image_set)).to(self.eval_backbone.backbone.device)

    def make_row_work_key(self, image_set: ImageSet, mode: Mode) -> str:
        """Return the digest of everything that a row, and the classifier file it leaves, depends on."""
        config, backbone = self.job.config, self.eval_backbone.backbone
        options = config.model_dump(mode="json", include={*PROTOCOL_OPTIONS, "save"})
        classifier_folder = get_classifier_folder(config.result_path).resolve()
        inputs = {
            "row": [image_set.name, mode, backbone.card.hash, backbone.card.spec],
            "images": compute_array_digest(image_set.images.pixels),
            "entries": [
                statistics.entry.summary.entry_digest
                for statistics in (self.eval_backbone.statistics, self.teacher_statistics)
            ],
            "classes": self.job.run.class_ids,
            "options": options,
            "labels": self.collect_label_key_inputs() if mode == "soft" else None,
            "saved_to": str(classifier_folder) if config.save else None,
            "version": version("sfm-distill"),
        }
        return compute_work_key(inputs, backbone.device)

    def collect_label_key_inputs(self) -> dict[str, Any] | None:
        """Return everything that the labels of an image set depend on, besides its images."""
        if self.labeller is None:
            return None
        labels = self.labeller.distilled_labels
        return labels.header.model_dump() | {"values": compute_array_digest(labels.probabilities)}


def compute_image_set_features(
    backbone: Backbone,
    image_set: ImageSet,
    needed_by_modes: Sequence[Mode],
    config: EvaluateConfig,
    work_folder: WorkFolder,
    progress: ProgressCallback,
) -> KeyedViewFeatures:
    """Compute the features of as many views of an image set as the modes need."""
    image_count = len(image_set.images.pixels)
    views = max(
        count_views_per_image_and_seed(config, mode, image_count)
        * (image_set.seeds_per_image if mode in VIEWS_BY_SEED_MODES else 1)
        for mode in needed_by_modes
    )
    crops = draw_view_crops(image_set.images, views, config.seed, config.crop_edge)
    stage = f"features of {image_set.name} images on {backbone.card.spec}"
    on_views = make_stage_progress_callback(progress, stage, "views")
    features = compute_view_features(backbone, image_set.images, crops, on_views, work_folder)
    return KeyedViewFeatures(features, work_folder.used_keys[-1])
