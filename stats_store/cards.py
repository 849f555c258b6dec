"""What an entry says about itself: the attributes of a run, and the commit that makes a run visible."""

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
    limit_items,
    validate_items_fail_fast,
)

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 0

MOST_ARRAYS = 1000
"""Arrays of an entry; there are about twenty."""


class SchemaVersion(BaseModel):
    """The schema a store or a commit was written with.

    A reader refuses another major version and any requirement that it does not know; it reads a newer minor
    version and ignores what it does not know.
    """

    model_config = ConfigDict(extra="ignore")

    major: VersionNumber = SCHEMA_MAJOR
    minor: VersionNumber = SCHEMA_MINOR
    requires: Annotated[list[Name], limit_items(100)] = []


class DatasetCard(BaseModel):
    """Which images an entry's statistics are of.

    Attributes
    ----------
    class_ids : list of str
        Folder names, WordNet ids or label numbers; they order the class axis of every array.
    class_names : list of str
        Display names, in the same order; may repeat.
    train_samples, test_samples : int
        Images used, per split.
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
    def _one_name_per_class(self) -> Self:
        if len(self.class_names) != len(self.class_ids):
            raise ValueError(f"{len(self.class_names)} class names for {len(self.class_ids)} class ids")
        return self


class FileCounts(BaseModel):
    """What became of the files of a dataset; a sample counts once, however many files it is made of.

    Attributes
    ----------
    found : int
        Samples that the source lists or its shards hold, and files that are no samples.
    used : int
        Samples that are in the entry, of both splits.
    unused : dict of str to int
        All others, by kind.
    """

    model_config = ConfigDict(extra="ignore")

    found: Count
    used: Count
    unused: CountsByName = {}


class ExtractionCard(BaseModel):
    """How an entry was computed.

    Attributes
    ----------
    options : dict
        Everything besides backbone and data that shapes the arrays; its digest is part of the entry's key.
    role : {"full", "tuning"}
        A tuning entry holds statistics of a part of the training split and the rest of it as held-out data.
    threads : int
        CPU threads that classifier and centres were computed with; features take one each.
    seconds, images_per_second : float
        Wall time of the features pass, and its rate over all splits.
    statistics_seconds : float or None
        Wall time of this entry's moments, classifier and sub-class centres, after the pass; None where that
        was not recorded.
    train_bytes : int or None
        Encoded bytes of the training samples, as the source held them; None where that was not recorded.
    flow_cosine : float or None
        In another precision than float32: how alike the flows of a few hundred images are in the two.
    composited : int or None
        Images used that were not fully opaque and are composited over the background that `options` tell;
        None where that was not recorded.
    composited_example : str
        Names the first of them.
    dark : int or None
        Images used that have more than 8 bits and no value above 1/16 of their range, where nothing said
        which value is white; None where that was not recorded.
    dark_example : str
        Names the first of them.
    files : FileCounts or None
        What became of the files of the dataset; None where that was not recorded.
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
        Whether the solver met its tolerance before its iteration limit.
    held_out_top1, held_out_top5 : float or None
        Accuracy on the held-out features, as a fraction; None where it is undefined.
    """

    model_config = ConfigDict(extra="ignore")

    solver: str
    l2: NonNegativeFloat
    iterations: Count
    converged: bool
    held_out_top1: Fraction | None
    held_out_top5: Fraction | None


class Summary(BaseModel):
    """One line of ``sfm store ls``.

    Attributes
    ----------
    backbone, model : str
        The spec that was asked for, and timm's name of the architecture behind it.
    backbone_hash, fingerprint, options : str
        The entry's key: SHA-256 digests, hexadecimal.
    listing : str
        Digest of the source's names, sizes and times: a repeat that sees the same listing reads no image.
    entry_digest : str
        Digest of the entry's content; ``NAME@DIGEST`` pins it.
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
        """Path of the entry's commits below ``index/``."""
        return f"{self.backbone_hash}/{self.fingerprint}/{self.options}"


class ObjectRecord(BaseModel):
    """Size in bytes and SHA-256 of one stored object."""

    size: ObjectSize
    sha256: Digest


class Commit(BaseModel):
    """Makes a run visible as one generation of one key, or (tombstone) makes a key's entry disappear.

    Attributes
    ----------
    run : str
        Id of the run, the folder below ``runs/``; for a tombstone, of the writer.
    arrays : dict of str to str
        Digest of every array.
    objects : dict of str to ObjectRecord
        Every object of the run, by path below ``runs/<run>/``, metadata included.
    """

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    schema_version: SchemaVersion = Field(default_factory=SchemaVersion, alias="schema")
    kind: Literal["entry", "tombstone"]
    run: RunId
    summary: Summary | None = None
    arrays: Annotated[dict[ObjectName, Digest], limit_items(MOST_ARRAYS)] = {}
    objects: Annotated[
        dict[ObjectName, ObjectRecord], validate_items_fail_fast(ObjectName, ObjectRecord)
    ] = {}
