"""The options of ``sfm extract``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from sfm.backbones.execution.modes import ExecutionOption
from sfm.config_fields import (
    MAX_ITERATIONS,
    MAX_PROCESSES,
    BackboneField,
    ConsentField,
    LocationField,
    ProcessCountField,
    RecipeField,
)
from sfm.constrained_types import MAX_INPUT_PIXELS
from sfm.stats_store.dataset_names import find_dataset_name_problem

ClassifierSolver = Literal["lbfgs", "adam"]

ADAM_EPOCHS = 10
"""Epochs of the solver ``adam``; it draws as many views of each image, unless told otherwise."""


class ExtractConfig(BaseModel):
    """Configuration of one extraction, for the command line and the library."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: LocationField[str] = Field(
        description="Where the images are: folder:PATH, wds:SHARDS, parquet:PLACE, torchvision:NAME, "
        "idx:PATH or builtin:NAME; see docs/sources.md.",
        json_schema_extra={"argument": True, "metavar": "DATASET"},
    )
    store: LocationField[str] = Field(
        description="Store to publish to: a path, s3://, gs:// or az:// URL; created if missing."
    )
    backbone: BackboneField[list[str]] = Field(
        min_length=1, description="Backbone to extract with; repeat the option for several in one pass."
    )
    name: RecipeField[str | None] = Field(
        default=None, min_length=1, description="Name of the dataset in the store; default: the source's own."
    )
    licence: RecipeField[str | None] = Field(
        default=None,
        min_length=1,
        description="Licence of the images, e.g. cc-by-4.0, for the entry and for what is exported from it; "
        "default: the source's own, if it has one.",
    )
    image_size: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_INPUT_PIXELS,
        description="Input size in pixels; default: each backbone's own.",
    )
    limit_per_class: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_ITERATIONS,
        description="Use at most this many images per class of each split.",
    )
    sub_classes: RecipeField[tuple[Annotated[int, Field(ge=2, le=MAX_ITERATIONS)], ...]] = Field(
        default=(5, 10), description="Numbers of sub-class centres to store, e.g. 5,10; needed for --ipc > 1."
    )
    exemplars: ConsentField[int] = Field(
        default=0,
        ge=0,
        le=MAX_ITERATIONS,
        description="Real images to store per class: half nearest to the class mean, half random. "
        "Everyone with access to the store can see them.",
    )
    classifier: RecipeField[ClassifierSolver] = Field(
        default="lbfgs",
        description="Solver of the full-data classifier: lbfgs (L2-regularised logistic regression on the "
        f"images, and on --views), or adam ({ADAM_EPOCHS} epochs on --views alone, as published).",
    )
    views: RecipeField[int] = Field(
        default=0,
        ge=0,
        le=MAX_ITERATIONS,
        description="Augmented views of each training image (flip, random resized crop) to train the "
        f"classifier on; each takes as long as the image. Default with --classifier adam: {ADAM_EPOCHS}, a "
        "new one every epoch.",
    )
    keep_train_features: ConsentField[bool] = Field(
        default=False, description="Store the training features too, for exact merging of stores."
    )
    no_held_out: RecipeField[bool] = Field(
        default=False,
        description="Do not store held-out features; the entry cannot be used to evaluate then.",
    )
    min_count: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_ITERATIONS,
        description="Minimum number of training images per class.",
    )
    small_classes: RecipeField[Literal["refuse", "drop"]] = Field(
        default="refuse", description="Refuse or drop classes below --min-count."
    )
    hold_out: RecipeField[float | None] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of every class to hold out of a dataset that has no held-out split, e.g. 0.1.",
    )
    tune_fraction: RecipeField[float | None] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Also publish an entry of role tuning, which holds out this share of the training split.",
    )
    replace: ConsentField[bool] = Field(
        default=False, description="Publish a new generation of existing entries."
    )
    rehash: RecipeField[bool] = Field(
        default=False, description="Read the images even if an entry with the same listing exists."
    )
    staging: LocationField[str | None] = Field(
        default=None,
        description="Folder for unfinished work; default: staging/ in a local store, else the user's cache.",
    )
    device: RecipeField[Literal["auto", "cpu", "cuda"]] = Field(
        default="auto", description="Device that the backbones run on."
    )
    threads: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="CPU threads on this machine, decoding included; default: one per core.",
    )
    workers: ProcessCountField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="Number of processes on this machine to extract in; default: only this one.",
    )
    scheduler: LocationField[str | None] = Field(
        default=None, description="Extract on the workers of a Dask scheduler, e.g. tcp://10.0.0.1:8786."
    )
    precision: RecipeField[Literal["float32", "bf16"]] = Field(
        default="float32", description="Precision of the backbones' forward pass; bf16 is faster on a GPU."
    )
    execution: RecipeField[ExecutionOption] = Field(
        default="auto",
        description="Execution mode of the backbones: auto (the fastest here) or eager (plain PyTorch, "
        "no optimisations).",
    )
    on_error: RecipeField[Literal["fail", "skip"]] = Field(
        default="fail",
        description="Fail on images that cannot be decoded, or skip them; the entry lists those skipped.",
    )
    dry_run: RecipeField[bool] = Field(
        default=False, description="Count images, extract a few, estimate time and space; write nothing."
    )
    seed: RecipeField[int] = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of sub-class centres, exemplars, views, the tuning split and --hold-out.",
    )

    @model_validator(mode="before")
    @classmethod
    def _draw_a_view_per_epoch_of_adam(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("classifier") == "adam":
            return {"views": ADAM_EPOCHS} | values
        return values

    @field_validator("views")
    @classmethod
    def _require_views_for_adam(cls, value: int, info: ValidationInfo) -> int:
        if value == 0 and info.data.get("classifier") == "adam":
            raise ValueError("--classifier adam trains on augmented views alone: give at least 1")
        return value

    @field_validator("scheduler")
    @classmethod
    def _refuse_workers_with_scheduler(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("workers") is not None:
            raise ValueError("uses the workers of a cluster, --workers starts some here: give one of the two")
        return value

    @field_validator("sub_classes", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("sub_classes")
    @classmethod
    def _sort_and_deduplicate(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @field_validator("name")
    @classmethod
    def _require_valid_name(cls, value: str | None) -> str | None:
        problem = None if value is None else find_dataset_name_problem(value)
        if problem:
            raise ValueError(problem)
        return value
