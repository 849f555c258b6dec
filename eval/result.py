"""The models of ``evaluation.json``: accuracies and their provenance."""

import re
import statistics
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sfm.backbones.crop_edge import CropEdge
from sfm.config_fields import MAX_DISTILLATION_BACKBONES, MAX_IMAGES_PER_CLASS, MAX_ITERATIONS
from sfm.constrained_types import (
    MAX_LABEL_TEMPERATURE,
    MIN_LABEL_TEMPERATURE,
    Count,
    Fraction,
    InputPixels,
    Name,
    NonNegativeFloat,
    PackageVersions,
)
from sfm.errors import InputError
from sfm.eval.config import DEFAULT_KD_TEMPERATURE, DEFAULT_KD_WEIGHT, Mode, ProjectorInit
from sfm.text import format_words_as_list, make_distinct_backbone_names

Item = TypeVar("Item")
Row = TypeVar("Row", "AccuracyRow", "FullDataRow")

ImageSetName = Literal["distilled", "none", "random", "nearest", "neighbour"]
FullDataClassifier = Literal["linear", "nearest class mean", "discriminant"]

MAX_CONFUSION_CLASSES = 100
"""Largest number of classes for which a row holds its confusion matrix."""

MAX_CONFUSED_PAIRS = 100

FailFastList = Annotated[list[Item], Field(fail_fast=True)]
"""A list in a file; validation reports its first bad element alone, not each of millions."""

PositiveCount = Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ClassAccuracies = FailFastList[Fraction | None]
ConfusionMatrix = FailFastList[FailFastList[Count]]

ImagesPerClass = Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
PixelDigest = Name
LabelDigest = Name
BackboneSpec = Name
BackboneHash = Name
EntryDigest = Name
FractionOfFullData = NonNegativeFloat
RelativePenalty = NonNegativeFloat
NoteText = str
ClassIndex = Count
AccuraciesBySeed = FailFastList[Fraction]
ExemplarIndicesByClass = FailFastList[FailFastList[Count]]


class ConfusedPair(BaseModel):
    """How often one class was predicted for another, over all seeds; classes by their index."""

    model_config = ConfigDict(frozen=True)

    right: ClassIndex
    predicted: ClassIndex
    count: Count


class LabelRecord(BaseModel):
    """The soft labels of the distilled images that a row of mode ``soft`` was trained on, or stands beside.

    Attributes
    ----------
    digest : str
        Of their values.
    bytes : int
        Size of their file.
    backbone : str
        Spec of the backbone whose classifier of all real images made them.
    views : int
        Views per image that they are averaged over.
    temperature : float
    """

    model_config = ConfigDict(frozen=True)

    digest: LabelDigest
    bytes: Count
    backbone: BackboneSpec
    views: PositiveCount
    temperature: NonNegativeFloat


class AccuracyRow(BaseModel):
    """Accuracy on held-out features of heads that were trained on a few images.

    Attributes
    ----------
    images : {"distilled", "none", "random", "nearest", "neighbour"}
        The image set trained on: the distilled images; no image but class means; random real images (another
        draw for every seed); the real ones nearest to their class mean; or those nearest to the distilled
        ones, by the backbone's features. As many real ones per class as distilled.
    backbone : str
        Spec of the backbone evaluated on.
    image_size : int
        Its input size, in pixels.
    mode : Mode
        Mode of training, see :class:`~sfm.eval.config.EvaluateOptions`.
    top1_mean, top5_mean : float
        Mean over seeds, as fractions. Top-5 is None with fewer than five classes.
    top1_std, top5_std : float
        Sample standard deviation over seeds (n - 1); 0 for one seed.
    seeds : int
        1 where nothing is random.
    top1, top5 : list of float
        The accuracy of every seed.
    recovered : float or None
        ``top1_mean`` as a fraction of the top-1 accuracy of the full-data classifier of the same backbone.
    exemplars : int or None
        For real images: smallest number of exemplars per class to choose from.
    chosen : list of list of int or None
        For the real images nearest to the distilled ones: their indices along the exemplar axis of the entry
        distilled from, by class, in the order of the distilled images.
    penalty : float or None
        For projectors in closed form: the chosen penalty, in multiples of the mean eigenvalue.
    confusion : list of list of int or None
        Without real images: held-out samples by true class (rows) and predicted class
        (columns), over all seeds; None above ``MAX_CONFUSION_CLASSES`` classes.
    confused : list of ConfusedPair or None
        The ``MAX_CONFUSED_PAIRS`` most frequent confusions, most frequent first.
    per_class : list of (float or None) or None
        Without real images: top-1 by class, over all seeds; None for a class without held-out samples.
    backbone_hash : str or None
        Of the backbone evaluated on. This and the following are None in files of older versions, and where
        the accuracy does not depend on them.
    epochs, views, seed : int or None
        Protocol of the training: passes, views per image and seed, seed of the run.
    crop_edge : {"clip", "zero"}
        Of the crops of views. This and the following are the defaults, as of older versions, where the
        accuracy does not depend on them.
    kd_temperature, kd_weight : float
        Of mode ``kd``.
    projector_init : ProjectorInit or None
        Start of the trained projector.
    unseen : bool or None
        Whether the images were not distilled on this backbone; None if it is unknown what they were distilled
        on. See :func:`mark_unseen_rows`.
    labels : LabelRecord or None
        In mode ``soft``: the labels of the distilled images. Real images had labels from the same classifier.
    label_robust_score : float or None
        Of distilled images in mode ``linear``: the label-robust score of DD-Ranking in [0, 1], see
        :mod:`sfm.eval.dd_ranking`; None without random real images to compare with.
    """

    model_config = ConfigDict(frozen=True)

    images: ImageSetName
    backbone: BackboneSpec
    image_size: InputPixels
    mode: Mode
    top1_mean: Fraction
    top1_std: Fraction
    top5_mean: Fraction | None
    top5_std: Fraction | None
    seeds: PositiveCount
    top1: AccuraciesBySeed
    top5: AccuraciesBySeed | None
    recovered: FractionOfFullData | None = None
    exemplars: Count | None = None
    chosen: ExemplarIndicesByClass | None = None
    penalty: RelativePenalty | None = None
    confusion: ConfusionMatrix | None = None
    confused: FailFastList[ConfusedPair] | None = None
    per_class: ClassAccuracies | None = None
    backbone_hash: BackboneHash | None = None
    epochs: PositiveCount | None = None
    views: PositiveCount | None = None
    seed: Seed | None = None
    crop_edge: CropEdge = "clip"
    kd_temperature: Annotated[float, Field(ge=MIN_LABEL_TEMPERATURE, le=MAX_LABEL_TEMPERATURE)] = (
        DEFAULT_KD_TEMPERATURE
    )
    kd_weight: Fraction = DEFAULT_KD_WEIGHT
    projector_init: ProjectorInit | None = None
    unseen: bool | None = None
    labels: LabelRecord | None = None
    label_robust_score: Fraction | None = None


class FullDataRow(BaseModel):
    """Accuracy of a classifier of all training images, on the same held-out features.

    Attributes
    ----------
    classifier : {"linear", "nearest class mean", "discriminant"}
        The linear classifier in the store; or, in closed form from its moments, the nearest class mean, or
        the linear discriminant of Gaussians with the pooled within-class covariance.
    top1, top5 : float
        As fractions. Top-5 is None with fewer than five classes.
    recovered : float or None
        `top1` as a fraction of that of the linear classifier.
    per_class : list of (float or None) or None
        Top-1 by class.
    unseen : bool or None
        As of :class:`AccuracyRow`.
    """

    model_config = ConfigDict(frozen=True)

    images: Literal["all real"] = "all real"
    backbone: BackboneSpec
    image_size: InputPixels
    classifier: FullDataClassifier
    top1: Fraction
    top5: Fraction | None
    recovered: FractionOfFullData | None = None
    per_class: ClassAccuracies | None = None
    unseen: bool | None = None


ResultRow = AccuracyRow | FullDataRow


class EntryRecord(BaseModel):
    """An entry of the store that accuracies come from.

    Attributes
    ----------
    train_per_class : float or None
        Real training images per class, on average.
    """

    model_config = ConfigDict(frozen=True)

    backbone: BackboneSpec
    backbone_hash: BackboneHash
    image_size: InputPixels
    entry_digest: EntryDigest
    held_out_samples: Count
    train_per_class: NonNegativeFloat | None = None


class SourceEntryRecord(BaseModel):
    """An entry of the store that images were distilled from.

    Attributes
    ----------
    backbone : str
        Spec of its backbone.
    backbone_hash : str or None
        None where a file of an older version does not say.
    image_size : int or None
        Input size in pixels; None as above.
    """

    model_config = ConfigDict(frozen=True)

    backbone: BackboneSpec
    backbone_hash: BackboneHash | None
    image_size: InputPixels | None
    entry_digest: EntryDigest

    def has_backbone_of(self, row: ResultRow) -> bool:
        """Return whether a row is of this backbone: by its hash, or else by spec and known input size."""
        row_hash = row.backbone_hash if isinstance(row, AccuracyRow) else None
        if row_hash and self.backbone_hash:
            return row_hash == self.backbone_hash
        return row.backbone == self.backbone and self.image_size in (None, row.image_size)


SourceEntryRecords = Annotated[
    list[SourceEntryRecord], Field(fail_fast=True, min_length=1, max_length=MAX_DISTILLATION_BACKBONES)
]


class Provenance(BaseModel):
    """The provenance of accuracies.

    Attributes
    ----------
    store : str
        URL without credentials.
    distilled_from : str
        Digest of the entry that the images were distilled from; of several, the first.
    distilled_on : str
        Spec of its backbone.
    distilled_on_hash : str or None
        Hash of its backbone; None in files of older versions.
    distilled_at : int or None
        Input size of its backbone, in pixels; None as above.
    distilled_from_entries : list of SourceEntryRecord or None
        All entries that the images were distilled from; None as above.
    evaluated_on : list of str or None
        Hashes of the backbones of the last command alone; None as above.
    distilled_on_known : bool
        Whether it is known which backbones the images were distilled on. If not, `distilled_on` is
        ``unknown``, and `distilled_from` is the entry that says which classes and held-out samples there are.
    image_source : str or None
        Where the images of another program were read; None for those of `sfm distill`.
    ipc : int
        Images per class; the largest number where classes have different ones.
    images_per_class : list of int or None
        By class, for images of another program.
    images : str
        Digest of the pixels that were evaluated.
    edited : bool or None
        Whether they differ from those that `sfm distill` wrote; None if its ``run.json`` does not say.
    entries : list of EntryRecord
        One per backbone evaluated on.
    seconds : float
        Wall time of the evaluation.
    """

    model_config = ConfigDict(frozen=True)

    store: str
    dataset: Name
    fingerprint: Name
    role: Literal["full", "tuning"]
    distilled_from: EntryDigest
    distilled_on: BackboneSpec
    ipc: ImagesPerClass
    images: PixelDigest
    edited: bool | None = None
    entries: FailFastList[EntryRecord]
    versions: PackageVersions
    device: Name
    seconds: NonNegativeFloat
    distilled_on_hash: BackboneHash | None = None
    distilled_at: InputPixels | None = None
    distilled_from_entries: SourceEntryRecords | None = None
    evaluated_on: FailFastList[BackboneHash] | None = None
    distilled_on_known: bool = True
    image_source: str | None = None
    images_per_class: FailFastList[ImagesPerClass] | None = None

    @property
    def source_entries(self) -> list[SourceEntryRecord]:
        """The entries that the images were distilled from; none if unknown.

        In a file of an older version the only one.
        """
        if not self.distilled_on_known:
            return []
        only = SourceEntryRecord(
            backbone=self.distilled_on,
            backbone_hash=self.distilled_on_hash,
            image_size=self.distilled_at,
            entry_digest=self.distilled_from,
        )
        return self.distilled_from_entries or [only]

    def format_backbone_names(self) -> str:
        """Return the specs of the backbones distilled on as text, with sizes where a spec has several.

        Where that is unknown, ``unknown``.
        """
        if not self.distilled_on_known:
            return self.distilled_on
        names = make_distinct_backbone_names(
            (entry.backbone, entry.image_size) for entry in self.source_entries
        )
        return format_words_as_list(list(dict.fromkeys(names)))


class EarlierCommand(BaseModel):
    """An earlier command whose rows the file still holds.

    Attributes
    ----------
    config : dict
        As of :class:`Evaluation`.
    backbones : list of str
        Hashes of those evaluated on.
    """

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]
    backbones: FailFastList[BackboneHash]
    versions: PackageVersions
    device: Name
    seconds: NonNegativeFloat


class Evaluation(BaseModel):
    """The accuracies of one command, or, as a file, of all commands on the same images.

    The rows of the last command come first; `config` and `provenance` are that command's.

    Attributes
    ----------
    config : dict
        Fields of :class:`~sfm.eval.config.EvaluateConfig`: the command line's ``--config`` repeats them.
    rows : list of AccuracyRow
    full_data : list of FullDataRow
    notes : list of str
        Sentences about missing rows, and about how to read the others.
    earlier : list of EarlierCommand
        Commands before the last one that rows come from.
    changes : list of str
        Sentences about the rows that the last command replaced, dropped and kept.
    """

    model_config = ConfigDict(frozen=True)

    command: Literal["evaluate"] = "evaluate"
    config: dict[str, Any]
    rows: FailFastList[AccuracyRow]
    full_data: FailFastList[FullDataRow]
    notes: FailFastList[str]
    provenance: Provenance
    earlier: FailFastList[EarlierCommand] = []
    changes: FailFastList[str] = []


class NotWrittenError(InputError):
    """Results that were measured and cannot be written.

    Attributes
    ----------
    evaluations : list of Evaluation
    """

    def __init__(self, message: str, evaluations: list[Evaluation]) -> None:
        super().__init__(message)
        self.evaluations = evaluations


def compute_mean_and_sample_std(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n - 1), which is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def is_row_on_distillation_backbone(row: ResultRow, provenance: Provenance) -> bool:
    """Return whether a row is of a backbone distilled on, at the same input size if that is known."""
    return any(entry.has_backbone_of(row) for entry in provenance.source_entries)


def mark_unseen_rows(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose rows say whether nothing was distilled on their backbone, if it is known."""
    is_known = evaluation.provenance.distilled_on_known

    def mark(row: Row) -> Row:
        unseen = None if not is_known else not is_row_on_distillation_backbone(row, evaluation.provenance)
        return row.model_copy(update={"unseen": unseen})

    return evaluation.model_copy(
        update={"rows": [*map(mark, evaluation.rows)], "full_data": [*map(mark, evaluation.full_data)]}
    )


def is_row_of_earlier_training(row: AccuracyRow) -> bool:
    """Return whether a row of ``joint`` or ``stage`` is older than the published training of these modes.

    Projectors started at zero, and both parts were trained on cross-entropy, the projector at 1e-2. Such rows
    do not say how their projector started.
    """
    return row.mode in ("joint", "stage") and row.projector_init is None


EARLIER_TRAINING_OPTIONS_HEADER = {"projector_init": "zero"}
"""Values in headers of classifier files of versions that did not record them."""


def make_training_options_header(row: AccuracyRow) -> dict[str, str]:
    """Return a row's protocol as the header of a classifier file holds it."""
    protocol = {
        "epochs": row.epochs,
        "views": row.views,
        "seed": row.seed,
        "seeds": row.seeds,
        "projector_init": row.projector_init,
        # Files of older versions have none of these: their values were today's defaults.
        "crop_edge": row.crop_edge if row.crop_edge != "clip" else None,
        "kd_temperature": row.kd_temperature if row.kd_temperature != DEFAULT_KD_TEMPERATURE else None,
        "kd_weight": row.kd_weight if row.kd_weight != DEFAULT_KD_WEIGHT else None,
    }
    return {name: str(value) for name, value in protocol.items() if value is not None}


def format_evaluation_json(evaluation: Evaluation) -> str:
    """Return an evaluation as indented JSON, with lists of numbers on one line each."""
    number = r"(?:-?[\d.]+(?:[eE][-+]?\d+)?|null)"
    # A JSON string holds no line break: no text can be mistaken for a list.
    number_list = re.compile(rf"\[\n\s*({number}(?:,\n\s*{number})*)\n\s*\]")
    return number_list.sub(
        lambda match: "[" + re.sub(r",\n\s*", ", ", match[1]) + "]", evaluation.model_dump_json(indent=1)
    )
