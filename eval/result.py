"""What an evaluation found; the content of ``evaluation.json``."""

import statistics
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sfm.eval.config import Mode

Fixed = Literal["linear", "nearest class mean"]


class Row(BaseModel):
    """Accuracy of what was trained on a few images, on held-out features.

    Attributes
    ----------
    images : {"distilled", "random", "nearest"}
        What was trained on: the distilled images, random real ones (another draw for every seed), or the real
        ones nearest to their class mean; as many per class.
    backbone : str
        Spec of the backbone evaluated on.
    image_size : int
        Its input size, in pixels.
    mode : {"linear", "inherit"}
    top1_mean, top5_mean : float
        Mean over seeds, as fractions. Top-5 is None with fewer than five classes.
    top1_std, top5_std : float
        Sample standard deviation over seeds (n - 1); 0 for one seed.
    seeds : int
    top1, top5 : list of float
        The figure of every seed.
    """

    model_config = ConfigDict(frozen=True)

    images: Literal["distilled", "random", "nearest"]
    backbone: str
    image_size: int
    mode: Mode
    top1_mean: float
    top1_std: float
    top5_mean: float | None
    top5_std: float | None
    seeds: int
    top1: list[float]
    top5: list[float] | None


class FullData(BaseModel):
    """Accuracy of a classifier made of all training images, on the same held-out features.

    Attributes
    ----------
    classifier : {"linear", "nearest class mean"}
        The linear classifier that the store holds, or the nearest of the class means that it holds.
    top1, top5 : float
        As fractions. Top-5 is None with fewer than five classes.
    """

    model_config = ConfigDict(frozen=True)

    images: Literal["all real"] = "all real"
    backbone: str
    image_size: int
    classifier: Fixed
    top1: float
    top5: float | None


class EntryRecord(BaseModel):
    """An entry of the store that figures come from."""

    model_config = ConfigDict(frozen=True)

    backbone: str
    backbone_hash: str
    image_size: int
    entry_digest: str
    held_out_samples: int


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
    ipc : int
        Images per class.
    images : str
        Digest of the pixels that were evaluated.
    entries : list of EntryRecord
        One per backbone evaluated on.
    seconds : float
        Wall time of the evaluation.
    """

    model_config = ConfigDict(frozen=True)

    store: str
    dataset: str
    fingerprint: str
    role: Literal["full", "tuning"]
    distilled_from: str
    distilled_on: str
    ipc: int
    images: str
    entries: list[EntryRecord]
    versions: dict[str, str]
    device: str
    seconds: float


class Evaluation(BaseModel):
    """Everything one evaluation found.

    Attributes
    ----------
    rows : list of Row
    full_data : list of FullData
    notes : list of str
        What is missing from the rows, or to be known when reading them, in sentences.
    """

    model_config = ConfigDict(frozen=True)

    command: Literal["evaluate"] = "evaluate"
    config: dict[str, Any]
    rows: list[Row]
    full_data: list[FullData]
    notes: list[str]
    provenance: Provenance


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n - 1); 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
