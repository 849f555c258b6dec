"""The cards of an entry, its summary, and the commit that makes its run visible: pydantic models."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sfm.constrained_types import (
    ClassCount,
    ClassIds,
    Count,
    CountsByName,
    Digest,
    ExtractionOptions,
    FeatureCount,
    FiniteFloat,
    Fraction,
    GenerationNumber,
    InputPixels,
    LeafFingerprints,
    Name,
    Names,
    NonNegativeFloat,
    ObjectName,
    ObjectSize,
    OptionalDigest,
    PackageVersions,
    RunId,
    Texts,
    VersionNumber,
    make_fail_fast_dict_validator,
    make_item_limit_validator,
)

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 0

MAX_ARRAYS = 1000
"""Limit on the arrays of an entry, which has about twenty."""


class SchemaVersion(BaseModel):
    """The schema version of a store or a commit.

    A reader refuses another major version and unknown requirements. It reads a newer minor version and
    ignores fields and arrays that it does not know.
    """

    model_config = ConfigDict(extra="ignore")

    major: VersionNumber = SCHEMA_MAJOR
    minor: VersionNumber = SCHEMA_MINOR
    requires: Annotated[list[Name], make_item_limit_validator(100)] = []


class DatasetCard(BaseModel):
    """The dataset of an entry: its name, classes, sizes and fingerprint.

    Attributes
    ----------
    class_ids : list of str
        Folder names, WordNet ids or label numbers, in the order of the class axis of every array.
    class_names : list of str
        Display names in the same order; they may repeat.
    train_samples, test_samples : int
        Number of images used, per split.
    fingerprint : str
        SHA-256 over per-class counts and sums of sample digests: the same images in another folder, or read
        in another order, have the same fingerprint.
    leaves : list of str
        Fingerprints of the extractions that were merged; the fingerprint itself if none were.
    """

    model_config = ConfigDict(extra="ignore")

    name: Name
    class_ids: ClassIds
    class_names: Names
    train_samples: Count
    test_samples: Count
    fingerprint: Digest
    leaves: LeafFingerprints
    licence: str = "unknown"
    source: str = "unknown"

    @model_validator(mode="after")
    def _require_one_name_per_class(self) -> Self:
        if len(self.class_names) != len(self.class_ids):
            raise ValueError(f"{len(self.class_names)} class names for {len(self.class_ids)} class ids")
        return self


class FileCounts(BaseModel):
    """Numbers of used and unused files of a dataset; a sample that consists of several files counts once.

    Attributes
    ----------
    found : int
        Samples in the listing or the shards of the source, and files that are not samples.
    used : int
        Samples in the entry, of both splits.
    unused : dict of str to int
        Number of all others, by reason.
    """

    model_config = ConfigDict(extra="ignore")

    found: Count
    used: Count
    unused: CountsByName = {}


class ExtractionCard(BaseModel):
    """The extraction of an entry: options, versions, times and skipped samples.

    Attributes
    ----------
    options : dict
        All options that shape the arrays; their digest is part of the key of the entry.
    role : {"full", "tuning"}
        A tuning entry holds statistics of a part of the training split, and the rest as held-out data.
    threads : int
        CPU threads that computed the classifier and the centres; features are computed with one thread each.
    seconds, images_per_second : float
        Wall time of the pass that computed the features, and its rate over all splits.
    statistics_seconds : float or None
        Wall time of moments, classifier and sub-class centres after the pass; None if not recorded.
    train_bytes : int or None
        Encoded bytes of the training samples in the source; None if not recorded.
    flow_cosine : float or None
        For another precision than float32: cosine between the flows of a few hundred images in both.
    composited : int or None
        Images used that were not fully opaque, and were composited over the background in `options`; None if
        not recorded.
    composited_example : str
        Name of the first of them.
    dark : int or None
        Images used that have more than 8 bits, no value above 1/16 of their range, and no known white level;
        None if not recorded.
    dark_example : str
        Name of the first of them.
    files : FileCounts or None
        None if not recorded.
    """

    model_config = ConfigDict(extra="ignore")

    options: ExtractionOptions
    role: Literal["full", "tuning"]
    versions: PackageVersions
    device: str
    threads: Count
    seconds: NonNegativeFloat
    images_per_second: NonNegativeFloat
    listing: OptionalDigest = ""
    skipped: Texts = []
    train_bytes: Count | None = None
    flow_cosine: FiniteFloat | None = None
    statistics_seconds: NonNegativeFloat | None = None
    composited: Count | None = None
    composited_example: str = ""
    dark: Count | None = None
    dark_example: str = ""
    files: FileCounts | None = None


class ClassifierCard(BaseModel):
    """The linear classifier trained on all real training features.

    Attributes
    ----------
    solver : str
    l2 : float
        Penalty ``l2 / 2 * |W|^2`` on the mean cross-entropy of standardised features.
    converged : bool
        Whether the solver met its tolerance before its iteration limit; False for one of a fixed number of
        epochs.
    held_out_top1, held_out_top5 : float or None
        Accuracy on the held-out features as a fraction; None if undefined.
    """

    model_config = ConfigDict(extra="ignore")

    solver: str
    l2: NonNegativeFloat
    iterations: Count
    converged: bool
    held_out_top1: Fraction | None
    held_out_top5: Fraction | None


class Summary(BaseModel):
    """The summary of an entry, as its commit stores it: one line of ``sfm store ls``.

    Attributes
    ----------
    backbone, model : str
        The requested spec, and the name of its architecture in timm.
    backbone_hash, fingerprint, options : str
        The key of the entry: hexadecimal SHA-256 digests.
    listing : str
        Digest of the names, sizes and times in the source: a repeated extraction with the same listing reads
        no image.
    entry_digest : str
        Digest of the content of the entry; ``NAME@DIGEST`` pins it.
    """

    model_config = ConfigDict(extra="ignore")

    dataset: Name
    backbone: Name
    model: Name
    backbone_hash: Digest
    image_size: InputPixels
    fingerprint: Digest
    options: Digest
    role: Literal["full", "tuning"]
    classes: ClassCount
    features: FeatureCount
    train_samples: Count
    test_samples: Count
    held_out_top1: Fraction | None
    listing: OptionalDigest = ""
    entry_digest: Digest
    generation: GenerationNumber
    created: Name

    @property
    def key(self) -> str:
        """Path of the commits of the entry below ``index/``."""
        return f"{self.backbone_hash}/{self.fingerprint}/{self.options}"


class ObjectRecord(BaseModel):
    """Size in bytes and SHA-256 of a stored object."""

    size: ObjectSize
    sha256: Digest


class Commit(BaseModel):
    """A commit: publishes a run as one generation of a key, or removes the entry of a key (tombstone).

    Attributes
    ----------
    run : str
        Id of the run, its folder below ``runs/``; of a tombstone, an id of the writer.
    arrays : dict of str to str
        Digest of every array.
    objects : dict of str to ObjectRecord
        Record of every object of the run, also of metadata, by path below ``runs/<run>/``.
    """

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    schema_version: SchemaVersion = Field(default_factory=SchemaVersion, alias="schema")
    kind: Literal["entry", "tombstone"]
    run: RunId
    summary: Summary | None = None
    arrays: Annotated[dict[ObjectName, Digest], make_item_limit_validator(MAX_ARRAYS)] = {}
    objects: Annotated[
        dict[ObjectName, ObjectRecord], make_fail_fast_dict_validator(ObjectName, ObjectRecord)
    ] = {}
