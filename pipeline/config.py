"""What can be asked of ``sfm extract``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sfm.config_fields import MANY, MOST_PROCESSES, BackboneField, Consent, Place, Processes, Recipe
from sfm.field_types import LARGEST_INPUT
from sfm.stats_store.dataset_names import find_name_problem


class ExtractConfig(BaseModel):
    """Configuration of one extraction; what the command line, the library and ``run.json`` hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Place[str] = Field(
        description="Where the images are: folder:PATH, wds:SHARDS, parquet:PLACE, torchvision:NAME, "
        "idx:PATH or builtin:NAME; see docs/sources.md.",
        json_schema_extra={"argument": True, "metavar": "DATASET"},
    )
    store: Place[str] = Field(
        description="Store to publish to: a path, s3://, gs:// or az:// URL; made if need be."
    )
    backbone: BackboneField[list[str]] = Field(
        min_length=1, description="Backbone to extract with; give it again for several in one pass."
    )
    name: Recipe[str | None] = Field(
        default=None, min_length=1, description="Name of the dataset in the store; default: the source's own."
    )
    licence: Recipe[str | None] = Field(
        default=None,
        min_length=1,
        description="Licence of the images, e.g. cc-by-4.0, for the entry and for what is exported from it; "
        "default: the source's own, where it names one.",
    )
    image_size: Recipe[int | None] = Field(
        default=None,
        ge=1,
        le=LARGEST_INPUT,
        description="Input size in pixels; default: each backbone's own.",
    )
    limit_per_class: Recipe[int | None] = Field(
        default=None, ge=1, le=MANY, description="Use at most this many images per class of each split."
    )
    sub_classes: Recipe[tuple[Annotated[int, Field(ge=2, le=MANY)], ...]] = Field(
        default=(5, 10), description="Numbers of sub-class centres to store, e.g. 5,10; needed for --ipc > 1."
    )
    exemplars: Consent[int] = Field(
        default=0,
        ge=0,
        le=MANY,
        description="Real images to store per class: half nearest to the class mean, half random. "
        "They leave with the store.",
    )
    views: Recipe[int] = Field(
        default=0,
        ge=0,
        le=MANY,
        description="Augmented views of each training image (flip, random resized crop) that the classifier "
        "learns from, besides the image itself; each costs as much as the image.",
    )
    keep_train_features: Consent[bool] = Field(
        default=False, description="Store the training features too, for exact merging of stores."
    )
    no_held_out: Recipe[bool] = Field(
        default=False, description="Do not store held-out features; such an entry cannot be evaluated on."
    )
    min_count: Recipe[int | None] = Field(
        default=None, ge=1, le=MANY, description="Least number of training images a class must have."
    )
    small_classes: Recipe[Literal["refuse", "drop"]] = Field(
        default="refuse", description="What to do with classes below --min-count."
    )
    hold_out: Recipe[float | None] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Hold this share of every class out of a dataset that has no held-out split, e.g. 0.1.",
    )
    tune_fraction: Recipe[float | None] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Also publish an entry of role tuning, with this share of the training split held out.",
    )
    replace: Consent[bool] = Field(
        default=False, description="Publish the next generation of entries that exist."
    )
    rehash: Recipe[bool] = Field(
        default=False, description="Read the images even if the source's listing is that of a stored entry."
    )
    staging: Place[str | None] = Field(
        default=None,
        description="Folder for unfinished work; default: staging/ in a local store, else the user's cache.",
    )
    device: Recipe[Literal["auto", "cpu", "cuda"]] = Field(
        default="auto", description="Where the backbones run."
    )
    threads: Recipe[int | None] = Field(
        default=None,
        ge=1,
        le=MOST_PROCESSES,
        description="CPU threads to compute with on this machine, decoding included. Default: one per core.",
    )
    workers: Processes[int | None] = Field(
        default=None,
        ge=1,
        le=MOST_PROCESSES,
        description="Extract in so many processes on this machine; default: in this one.",
    )
    scheduler: Place[str | None] = Field(
        default=None, description="Extract on the workers of a Dask scheduler, e.g. tcp://10.0.0.1:8786."
    )
    precision: Recipe[Literal["float32", "bf16"]] = Field(
        default="float32", description="Of the backbones' forward pass; bf16 is faster on a GPU."
    )
    on_error: Recipe[Literal["fail", "skip"]] = Field(
        default="fail",
        description="What to do about images that cannot be decoded; the entry lists those skipped.",
    )
    dry_run: Recipe[bool] = Field(
        default=False, description="Count, look at a few images, estimate time and space, and write nothing."
    )
    seed: Recipe[int] = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of sub-class centres, exemplars, views, the tuning split and --hold-out.",
    )

    @field_validator("scheduler")
    @classmethod
    def _one_way_to_run(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("workers") is not None:
            raise ValueError("uses the workers of a cluster, --workers starts some here: give one of the two")
        return value

    @field_validator("sub_classes", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("sub_classes")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @field_validator("name")
    @classmethod
    def _no_pin(cls, value: str | None) -> str | None:
        problem = None if value is None else find_name_problem(value)
        if problem:
            raise ValueError(problem)
        return value
