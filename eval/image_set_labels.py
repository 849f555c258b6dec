"""Soft labels of every image set: those that came with the distilled images, and the same for real ones."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sfm.backbones.soft_labels import compute_average_soft_labels
from sfm.eval.evaluated_backbones import EvaluatedBackbone
from sfm.eval.image_sets import ImageSet
from sfm.eval.mode_training import make_stage_progress_callback
from sfm.eval.result import LabelRecord
from sfm.events import ProgressCallback
from sfm.soft_label_files import SoftLabels
from sfm.stats_store.digests import compute_array_digest

PixelsDigest = str


@dataclass(frozen=True)
class ImageSetLabeller:
    """Labels image sets for mode ``soft``.

    Real images get labels from the classifier, views, temperature and seed of the distilled images' labels.
    Otherwise the labels, which know all real images, would be credited to the distilled images.

    Attributes
    ----------
    distilled_labels : SoftLabels
    teacher : EvaluatedBackbone or None
        The backbone distilled on, with its statistics; None if real images need no labels.
    progress : ProgressCallback
    """

    distilled_labels: SoftLabels
    teacher: EvaluatedBackbone | None
    progress: ProgressCallback
    _computed: dict[PixelsDigest, npt.NDArray[np.float32]] = field(default_factory=dict, init=False)

    def can_label(self, image_set: ImageSet) -> bool:
        """Return whether an image set has labels or can be labelled."""
        return image_set.name == "distilled" or self.teacher is not None

    def label_images(self, image_set: ImageSet) -> npt.NDArray[np.float32]:
        """Return the labels of an image set, shape (image, class); those of real images are computed once.

        Raises
        ------
        ValueError
            If it cannot be labelled, see :meth:`can_label`.
        """
        if image_set.name == "distilled":
            return self.distilled_labels.probabilities
        if self.teacher is None:
            raise ValueError("no classifier to label real images with")
        digest = compute_array_digest(image_set.images.pixels)
        if digest not in self._computed:
            header, backbone = self.distilled_labels.header, self.teacher.backbone
            stage = f"soft labels of {image_set.name} images by {backbone.card.spec}"
            self._computed[digest] = compute_average_soft_labels(
                backbone,
                image_set.images.pixels,
                self.teacher.statistics.read_per_class_array("classifier/weight"),
                self.teacher.statistics.read_per_class_array("classifier/bias"),
                views=header.views,
                temperature=header.temperature,
                seed=header.seed,
                on_views=make_stage_progress_callback(self.progress, stage, "views"),
            )
        return self._computed[digest]

    def make_label_record(self) -> LabelRecord:
        """Return what rows of mode ``soft`` record of the labels."""
        header = self.distilled_labels.header
        return LabelRecord(
            digest=compute_array_digest(self.distilled_labels.probabilities),
            bytes=self.distilled_labels.file_bytes,
            backbone=header.backbone,
            views=header.views,
            temperature=header.temperature,
        )
