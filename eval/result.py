"""What an evaluation found; the content of ``evaluation.json``."""

import re
import statistics
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sfm.config_fields import MAX_IMAGES_PER_CLASS, MAX_ITERATIONS
from sfm.constrained_types import Count, Fraction, InputPixels, Name, NonNegativeFloat, PackageVersions
from sfm.errors import InputError
from sfm.eval.config import Mode

T = TypeVar("T")

Images = Literal["distilled", "none", "random", "nearest", "neighbour"]
Fixed = Literal["linear", "nearest class mean", "discriminant"]

CLASSES_IN_FULL = 100
"""Up to so many classes a row holds its whole confusion matrix."""

MOST_CONFUSED = 100

ListOf = Annotated[list[T], Field(fail_fast=True)]
"""A list of a file: what is wrong with the first element is told, not with each of millions."""

Times = Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PerClass = ListOf[Fraction | None]
Confusion = ListOf[ListOf[Count]]


class ConfusedPair(BaseModel):
    """How often one class was taken for another, over all seeds; classes by their index."""

    model_config = ConfigDict(frozen=True)

    right: Count
    predicted: Count
    count: Count


class Row(BaseModel):
    """Accuracy of what was trained on a few images, on held-out features.

    Attributes
    ----------
    images : {"distilled", "none", "random", "nearest", "neighbour"}
        What was trained on: the distilled images; nothing but class means; random real images (another draw
        for every seed); the real ones nearest to their class mean; or those nearest to the distilled ones, as
        the backbone sees them. As many real ones per class as distilled.
    backbone : str
        Spec of the backbone evaluated on.
    image_size : int
        Its input size, in pixels.
    mode : Mode
        What was trained, see :class:`~sfm.eval.config.EvaluateOptions`.
    top1_mean, top5_mean : float
        Mean over seeds, as fractions. Top-5 is None with fewer than five classes.
    top1_std, top5_std : float
        Sample standard deviation over seeds (n - 1); 0 for one seed.
    seeds : int
        1 where nothing is random.
    top1, top5 : list of float
        The figure of every seed.
    recovered : float or None
        ``top1_mean`` as a fraction of the top-1 accuracy of the full-data classifier of the same backbone.
    exemplars : int or None
        For real images: how many of the class that has fewest there were to choose from.
    chosen : list of list of int or None
        For the real images nearest to the distilled ones: their places along the exemplar axis of the entry
        distilled from, by class, in the order of the distilled images.
    penalty : float or None
        For projectors in closed form: the chosen penalty, in multiples of the mean eigenvalue.
    confusion : list of list of int or None
        For what was trained on no real image: held-out samples by right class (rows) and predicted class
        (columns), over all seeds; None above ``CLASSES_IN_FULL`` classes.
    confused : list of ConfusedPair or None
        The ``MOST_CONFUSED`` most frequent confusions, most frequent first.
    per_class : list of (float or None) or None
        For what was trained on no real image: top-1 by class, over all seeds; None for a class without
        held-out samples.
    backbone_hash : str or None
        Of the backbone evaluated on. This and the following are None in files of versions that did not write
        them, and where they have no part in the figure.
    epochs, views, seed : int or None
        Protocol of the training: passes, views per image and seed, seed of the run.
    """

    model_config = ConfigDict(frozen=True)

    images: Images
    backbone: Name
    image_size: InputPixels
    mode: Mode
    top1_mean: Fraction
    top1_std: Fraction
    top5_mean: Fraction | None
    top5_std: Fraction | None
    seeds: Times
    top1: ListOf[Fraction]
    top5: ListOf[Fraction] | None
    recovered: NonNegativeFloat | None = None
    exemplars: Count | None = None
    chosen: ListOf[ListOf[Count]] | None = None
    penalty: NonNegativeFloat | None = None
    confusion: Confusion | None = None
    confused: ListOf[ConfusedPair] | None = None
    per_class: PerClass | None = None
    backbone_hash: Name | None = None
    epochs: Times | None = None
    views: Times | None = None
    seed: Seed | None = None


class FullData(BaseModel):
    """Accuracy of a classifier made of all training images, on the same held-out features.

    Attributes
    ----------
    classifier : {"linear", "nearest class mean", "discriminant"}
        The linear classifier that the store holds; or what its moments give in closed form: the nearest of
        the class means, or the linear discriminant of Gaussians with the pooled within-class covariance.
    top1, top5 : float
        As fractions. Top-5 is None with fewer than five classes.
    recovered : float or None
        `top1` as a fraction of that of the linear classifier.
    per_class : list of (float or None) or None
        Top-1 by class.
    """

    model_config = ConfigDict(frozen=True)

    images: Literal["all real"] = "all real"
    backbone: Name
    image_size: InputPixels
    classifier: Fixed
    top1: Fraction
    top5: Fraction | None
    recovered: NonNegativeFloat | None = None
    per_class: PerClass | None = None


class EntryRecord(BaseModel):
    """An entry of the store that figures come from.

    Attributes
    ----------
    train_per_class : float or None
        Real training images per class, on average.
    """

    model_config = ConfigDict(frozen=True)

    backbone: Name
    backbone_hash: Name
    image_size: InputPixels
    entry_digest: Name
    held_out_samples: Count
    train_per_class: NonNegativeFloat | None = None


class Provenance(BaseModel):
    """Where the figures come from.

    Attributes
    ----------
    store : str
        URL without credentials.
    distilled_from : str
        Digest of the entry that the images were distilled from.
    distilled_on : str
        Spec of its backbone.
    distilled_on_hash : str or None
        Hash of its backbone; None in files of versions that did not write it.
    distilled_at : int or None
        Input size of its backbone, in pixels; None as above.
    evaluated_on : list of str or None
        Hashes of the backbones of the last command alone; None as above.
    ipc : int
        Images per class.
    images : str
        Digest of the pixels that were evaluated.
    edited : bool or None
        Whether they are others than `sfm distill` wrote; None if its ``run.json`` does not say.
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
    distilled_from: Name
    distilled_on: Name
    ipc: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
    images: Name
    edited: bool | None = None
    entries: ListOf[EntryRecord]
    versions: PackageVersions
    device: Name
    seconds: NonNegativeFloat
    distilled_on_hash: Name | None = None
    distilled_at: InputPixels | None = None
    evaluated_on: ListOf[Name] | None = None


class EarlierEvaluation(BaseModel):
    """A command whose figures stand in the same file as those of a later one.

    Attributes
    ----------
    config : dict
        As of :class:`Evaluation`.
    backbones : list of str
        Hashes of those evaluated on.
    """

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]
    backbones: ListOf[Name]
    versions: PackageVersions
    device: Name
    seconds: NonNegativeFloat


class Evaluation(BaseModel):
    """What one command found, or, as a file, what all commands found of the same images.

    The rows of the last command come first; `config` and `provenance` are that command's.

    Attributes
    ----------
    config : dict
        What :class:`~sfm.eval.config.EvaluateConfig` takes: the command line's ``--config`` repeats it.
    rows : list of Row
    full_data : list of FullData
    notes : list of str
        What is missing from the rows, or to be known when reading them, in sentences.
    earlier : list of EarlierEvaluation
        Commands before the last one that rows come from.
    changes : list of str
        What the last command did to rows that the file held before, in sentences.
    """

    model_config = ConfigDict(frozen=True)

    command: Literal["evaluate"] = "evaluate"
    config: dict[str, Any]
    rows: ListOf[Row]
    full_data: ListOf[FullData]
    notes: ListOf[str]
    provenance: Provenance
    earlier: ListOf[EarlierEvaluation] = []
    changes: ListOf[str] = []


class NotWrittenError(InputError):
    """Results that were found and cannot be written.

    Attributes
    ----------
    evaluations : list of Evaluation
    """

    def __init__(self, message: str, evaluations: list[Evaluation]) -> None:
        super().__init__(message)
        self.evaluations = evaluations


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n - 1); 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def is_own(row: Row, provenance: Provenance) -> bool:
    """Return whether a row is of the backbone distilled on: of its weights and input size, if known."""
    if row.backbone_hash and provenance.distilled_on_hash:
        return row.backbone_hash == provenance.distilled_on_hash
    same_size = provenance.distilled_at in (None, row.image_size)
    return row.backbone == provenance.distilled_on and same_size


def protocol_header(row: Row) -> dict[str, str]:
    """Return how a row's classifier was trained, as the header of its file says it."""
    told = {"epochs": row.epochs, "views": row.views, "seed": row.seed, "seeds": row.seeds}
    return {name: str(value) for name, value in told.items() if value is not None}


def as_json(evaluation: Evaluation) -> str:
    """Return an evaluation as JSON that a person can read: lists of numbers on one line each."""
    number = r"(?:-?[\d.]+(?:[eE][-+]?\d+)?|null)"
    # A line break never stands inside a JSON string: no text can be mistaken for a list.
    numbers = re.compile(rf"\[\n\s*({number}(?:,\n\s*{number})*)\n\s*\]")
    return numbers.sub(
        lambda found: "[" + re.sub(r",\n\s*", ", ", found[1]) + "]", evaluation.model_dump_json(indent=1)
    )
