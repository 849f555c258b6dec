"""The cross-backbone matrix: images distilled on one backbone, evaluated on others."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, computed_field

from sfm.eval.config import Mode
from sfm.eval.result import Evaluation, is_row_on_distillation_backbone


class MatrixCell(BaseModel):
    """One accuracy of the cross-backbone matrix.

    Attributes
    ----------
    run : str
        Directory of the distilled images.
    distilled_on : str
        Names of the backbones they were distilled on: the row.
    ipc : int
        Images per class; the largest number where classes have different ones.
    backbone : str
        Spec of the backbone evaluated on: with `image_size`, the column.
    image_size : int
        Its input size, in pixels.
    own_backbone : bool
        Whether it is one distilled on, at the same input size.
    unseen : bool or None
        Whether it is none of those; None if it is unknown what they are.
    mode : Mode
        Mode of training; there is one matrix per mode.
    top1_mean, top1_std : float
        Fractions: mean and standard deviation over `seeds`.
    recovered : float or None
        Fraction of the full-data accuracy of the column's backbone.
    distilled_on_known : bool
        Whether it is known what the images were distilled on.
    images_per_class : list of int or None
        By class, for images of another program.
    label_robust_score : float or None
        As of :class:`~sfm.eval.result.AccuracyRow`.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    distilled_on: str
    ipc: int
    backbone: str
    image_size: int
    mode: Mode
    top1_mean: float
    top1_std: float
    seeds: int
    recovered: float | None
    own_backbone: bool = False
    distilled_on_known: bool = True
    images_per_class: list[int] | None = None
    label_robust_score: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def unseen(self) -> bool | None:
        """Whether nothing was distilled on the column's backbone; None if that is unknown."""
        return None if not self.distilled_on_known else not self.own_backbone


def make_matrix(evaluations: Sequence[Evaluation]) -> list[MatrixCell]:
    """Return the cells of several evaluations: every row that was not trained on real images."""
    return [
        MatrixCell(
            run=evaluation.config["run"],
            distilled_on=evaluation.provenance.format_backbone_names(),
            ipc=evaluation.provenance.ipc,
            backbone=row.backbone,
            image_size=row.image_size,
            mode=row.mode,
            top1_mean=row.top1_mean,
            top1_std=row.top1_std,
            seeds=row.seeds,
            recovered=row.recovered,
            own_backbone=is_row_on_distillation_backbone(row, evaluation.provenance),
            distilled_on_known=evaluation.provenance.distilled_on_known,
            images_per_class=evaluation.provenance.images_per_class,
            label_robust_score=row.label_robust_score,
        )
        for evaluation in evaluations
        for row in evaluation.rows
        if row.images in ("distilled", "none")
    ]
