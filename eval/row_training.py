"""Train and score accuracy rows; finished rows and features are kept so that a command can resume."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.errors import InputError
from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.eval.classifier_files import save_first_seed_classifier
from sfm.eval.config import (
    EvaluateConfig,
    Mode,
    count_views_per_image_and_seed,
    get_classifier_folder,
    make_row_training_options,
)
from sfm.eval.evaluated_backbones import EvaluatedBackbone, select_source_statistics
from sfm.eval.evaluation_job import EvaluationJob
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

PROTOCOL_OPTIONS = ("seeds", "epochs", "views", "projector_views", "seed")
"""Options that every accuracy depends on."""

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
    """

    job: EvaluationJob
    eval_backbone: EvaluatedBackbone
    held_out_samples: HeldOutSamples
    full_data_top1: float
    work_folder: WorkFolder
    progress: ProgressCallback

    @property
    def source_statistics(self) -> ClassSubsetStatistics:
        """The statistics whose classifier is inherited: the backbone's own if it was distilled on."""
        return select_source_statistics(self.job.sources, self.eval_backbone.backbone.card.hash)

    def read_or_train_row(
        self,
        image_set: ImageSet,
        mode: Mode,
        compute_shared_features: Callable[[Backbone], KeyedViewFeatures] | None,
        appended_write_failures: list[WriteFailure],
    ) -> AccuracyRow:
        """Return the accuracy row of a mode on an image set; finished rows in the work folder are read.

        Parameters
        ----------
        image_set : ImageSet
        mode : Mode
        compute_shared_features : callable, optional
            Returns the features of the images' views through a backbone; by default they are computed for
            this row alone.
        appended_write_failures : list of str
            Messages about files that could not be written are appended.
        """
        config = self.job.config
        key = self.make_row_work_key(image_set, mode)
        finished_row = self.work_folder.read_row_if_intact(key)
        if finished_row is not None:
            return finished_row
        target_features: KeyedViewFeatures | None = None
        if compute_shared_features is None:
            view_features = compute_image_set_features(
                self.eval_backbone.backbone, image_set, [mode], config, self.work_folder, self.progress
            )
        else:
            view_features = compute_shared_features(self.eval_backbone.backbone)
            if mode in TARGET_FEATURE_MODES:
                target_features = compute_shared_features(
                    self.job.get_teacher_backbone(self.eval_backbone.backbone)
                )
        context = ModeTrainingContext(
            self.eval_backbone,
            self.source_statistics,
            image_set,
            view_features.features,
            target_features.features if target_features else None,
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
        if config.save and image_set.name == "distilled":
            folder = get_classifier_folder(config.result_path)
            try:
                save_first_seed_classifier(
                    folder, fitted_heads, row, self.job.run, self.eval_backbone, self.source_statistics
                )
            except InputError as error:
                appended_write_failures.append(str(error))
                return row
        self.work_folder.write_row(key, row, [f.work_key for f in (view_features, target_features) if f])
        return row

    def make_row_work_key(self, image_set: ImageSet, mode: Mode) -> str:
        """Return the digest of everything that a row, and the classifier file it leaves, depends on."""
        config, backbone = self.job.config, self.eval_backbone.backbone
        options = config.model_dump(mode="json", include={*PROTOCOL_OPTIONS, "save"})
        classifier_folder = get_classifier_folder(config.result_path).resolve()
        return compute_work_key(
            row=[image_set.name, mode, backbone.card.hash, backbone.card.spec],
            images=compute_array_digest(image_set.images.pixels),
            entries=[
                statistics.entry.summary.entry_digest
                for statistics in (self.eval_backbone.statistics, self.source_statistics)
            ],
            classes=self.job.run.class_ids,
            options=options,
            saved_to=str(classifier_folder) if config.save else None,
            version=version("sfm-distill"),
            device=backbone.device,
        )


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
        * (image_set.seeds_per_image if mode in ("linear", "kd") else 1)
        for mode in needed_by_modes
    )
    crops = draw_view_crops(image_set.images, views, config.seed)
    stage = f"features of {image_set.name} images on {backbone.card.spec}"
    on_views = make_stage_progress_callback(progress, stage, "views")
    features = compute_view_features(backbone, image_set.images, crops, on_views, work_folder)
    return KeyedViewFeatures(features, work_folder.used_keys[-1])
