"""Configuration of `sfm evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfm.backbones.crop_edge import CropEdge
from sfm.config_fields import (
    MAX_ITERATIONS,
    MAX_PROCESSES,
    BackboneField,
    FeatureViewsField,
    InMemoryCountField,
    LocationField,
    RecipeField,
)
from sfm.constrained_types import MAX_INPUT_PIXELS, MAX_LABEL_TEMPERATURE, MIN_LABEL_TEMPERATURE
from sfm.errors import InputError
from sfm.eval.output_files import make_distinct_directory_names
from sfm.eval.run_directory import is_run_directory, make_foreign_result_folder
from sfm.paths import expand_home_in_path_or_list, resolve_links

DEFAULT_KD_TEMPERATURE, DEFAULT_KD_WEIGHT = 4.0, 0.5

Mode = Literal["linear", "soft", "inherit", "inherit-ridge", "inherit-statistics", "kd", "joint", "stage"]
MODES: tuple[Mode, ...] = get_args(Mode)
ProjectorInit = Literal["zero", "default"]
"""Start of a projector: zero, or as ``torch.nn.Linear`` is initialised."""

VIEWS_BY_SEED_MODES = frozenset({"linear", "soft", "kd"})
"""Modes that train fresh heads, every seed on its own views."""

CLOSED_FORM_MODES = frozenset({"inherit-ridge", "inherit-statistics"})
"""Modes in closed form: nothing is random, so they have one seed."""

ALL_BACKBONES = "all"
"""Value of `--backbone` for every backbone of the store."""

TOTAL_PROJECTOR_VIEWS = 3000

RESULT_FILE = "evaluation.json"
CLASSIFIER_FOLDER = "classifiers"
"""Folder of saved classifiers, beside the result."""

MAX_CLASSIFIER_BYTES = 2**31
"""Largest file of a classifier that is read."""


def get_classifier_folder(result_path: Path) -> Path:
    """Return the folder with the classifiers of a result, one folder per result."""
    return result_path.with_name(
        CLASSIFIER_FOLDER if result_path.name == RESULT_FILE else f"{result_path.stem}-{CLASSIFIER_FOLDER}"
    )


class EvaluateOptions(BaseModel):
    """Options of an evaluation of one or more runs; the command line has one option per field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: LocationField[str] = Field(description="Store the images were distilled from: a path or URL.")
    backbone: BackboneField[list[str]] = Field(
        default=[],
        description="Backbone to evaluate on; repeat for several, or `all` for every one that the store "
        "holds of this dataset. Default: those distilled on.",
    )
    image_size: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_INPUT_PIXELS,
        description="Input size of the evaluation backbones, in pixels. Default: the size distilled at, "
        "where the store holds it.",
    )
    mode: RecipeField[list[Mode]] = Field(
        default=["linear", "inherit", "inherit-statistics"],
        min_length=1,
        description="What to train on the images; repeat for several. linear: a fresh head. soft: the same, "
        "on the soft labels of `sfm distill --soft-labels`. inherit: a projector to the classifier that the "
        "store holds; inherit-ridge: the same in closed form; inherit-statistics: the same from class means, "
        "without images. kd: a head, from that classifier's soft labels of every view. joint: a projector "
        "and that classifier, together, on the labels. stage: that classifier, on the labels, behind the "
        "projector of inherit.",
    )
    projector_init: RecipeField[ProjectorInit] = Field(
        default="zero",
        description="Start of the projector of inherit and stage: zero, or default, as torch.nn.Linear is "
        "initialised, which is the published setting.",
    )
    seeds: InMemoryCountField[int] = Field(
        default=3, ge=1, le=MAX_ITERATIONS, description="Repetitions; the table shows mean and deviation."
    )
    epochs: RecipeField[int] = Field(
        default=1000, ge=1, le=MAX_ITERATIONS, description="Passes over the synthetic images."
    )
    views: FeatureViewsField[int] = Field(
        default=50,
        ge=1,
        le=MAX_ITERATIONS,
        description="Augmented views per image and seed that heads are trained on, their features computed "
        "once. With as many views as epochs, every epoch has a new view.",
    )
    projector_views: FeatureViewsField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_ITERATIONS,
        description="Views per image that projectors are trained on; they have more weights to fit, and all "
        f"seeds share the views. Default: {TOTAL_PROJECTOR_VIEWS} of all images together, at least --views.",
    )
    crop_edge: RecipeField[CropEdge] = Field(
        default="clip",
        description="Crops of views that would be larger than the image are cut to it (clip), or show zeros "
        "outside of it (zero, as in the published code).",
    )
    kd_temperature: RecipeField[float] = Field(
        default=DEFAULT_KD_TEMPERATURE,
        ge=MIN_LABEL_TEMPERATURE,
        le=MAX_LABEL_TEMPERATURE,
        description="Temperature of both softmaxes of mode kd.",
    )
    kd_weight: RecipeField[float] = Field(
        default=DEFAULT_KD_WEIGHT,
        ge=0,
        le=1,
        description="Weight of the soft labels in mode kd; the labels have the rest.",
    )
    save: RecipeField[bool] = Field(
        default=False,
        description="Also write the classifiers of the first seed to classifiers/ beside the result, as "
        "safetensors; with --out NAME.json, to NAME-classifiers/.",
    )
    out: LocationField[Path | None] = Field(
        default=None,
        description="Where to write instead of RUN/evaluation.json, for read-only runs: a .json file, "
        "or a folder (with a folder in it for each of several runs). For images of another program a folder, "
        "which `sfm report` takes; default: PATH-evaluation beside them.",
    )
    device: RecipeField[Literal["auto", "cpu", "cuda"]] = Field(
        default="auto", description="Where to compute."
    )
    seed: RecipeField[int] = Field(default=0, ge=0, lt=2**63, description="Seed of all randomness.")
    threads: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="CPU threads to compute with. Default: one per core, or as OMP_NUM_THREADS says.",
    )

    # For images of other programs.
    dataset: RecipeField[str | None] = Field(
        default=None,
        description="For images of another program: the dataset whose statistics they are scored against, as "
        "NAME, NAME@DIGEST or NAME@tuning. Default: that of a run beside them, or the only one of the store. "
        "A run directory names its own.",
    )
    distilled_on: BackboneField[list[str]] = Field(
        default=[],
        description="For images of another program: the backbone that they were distilled on; repeat for "
        "several. Without it, that is marked as unknown, and what a backbone inherits from it is left out.",
    )

    _expand_out = field_validator("out")(expand_home_in_path_or_list)


class EvaluateConfig(EvaluateOptions):
    """Configuration of the evaluation of one run; ``evaluation.json`` holds it."""

    run: LocationField[Path] = Field(
        description="Directory that `sfm distill` wrote, or images of another program."
    )

    _expand_run = field_validator("run")(expand_home_in_path_or_list)

    @property
    def is_run_directory(self) -> bool:
        """Whether the images are in a directory that this program wrote."""
        return is_run_directory(self.run)

    @property
    def result_path(self) -> Path:
        """The result file to write."""
        if self.out is None:
            return (self.run if self.is_run_directory else make_foreign_result_folder(self.run)) / RESULT_FILE
        return self.out if self.out.suffix == ".json" else self.out / RESULT_FILE


class EvaluateRunsConfig(EvaluateOptions):
    """Configuration of the evaluation of several runs on the same backbones: a matrix."""

    run: LocationField[list[Path]] = Field(
        min_length=1,
        description="Directory that `sfm distill` wrote; or images of another program: a folder of class "
        "folders, a .npz, .pt, .pth or .safetensors file of images and labels, a WebDataset .tar, a .parquet "
        "table. Several give a matrix of all of them.",
        json_schema_extra={"argument": True, "metavar": "RUN"},
    )

    _expand_run = field_validator("run")(expand_home_in_path_or_list)

    @field_validator("run", mode="before")
    @classmethod
    def _wrap_single_run(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    def split_by_run(self) -> list[EvaluateConfig]:
        """Return one configuration per run.

        Raises
        ------
        InputError
            If a run is given twice, or one file is to hold the results of several.
        """
        options = self.model_dump(exclude={"run", "out"})
        paths = [resolve_links(run) for run in self.run]
        for run, path in zip(self.run, paths, strict=True):
            if paths.count(path) > 1:
                raise InputError(f"{run} is given more than once: name every run directory once")
        return [
            EvaluateConfig(run=run, out=out, **options)
            for run, out in zip(self.run, self._list_out_options_by_run(), strict=True)
        ]

    def _list_out_options_by_run(self) -> list[Path | None]:
        if self.out is None or len(self.run) == 1:
            return [self.out for _ in self.run]
        if self.out.suffix == ".json":
            raise InputError(f"--out {self.out} is one file, for {len(self.run)} runs: give a folder")
        return [self.out / name.replace("/", "_") for name in make_distinct_directory_names(self.run)]


def count_views_per_image_and_seed(config: EvaluateOptions, mode: Mode, image_count: int) -> int:
    """Return how many views of every image a seed of a mode trains on.

    Parameters
    ----------
    config : EvaluateOptions
    mode : Mode
    image_count : int
    """
    if mode in VIEWS_BY_SEED_MODES:
        return config.views
    return config.projector_views or max(config.views, -(-TOTAL_PROJECTOR_VIEWS // image_count))


@dataclass(frozen=True)
class RowTrainingOptions:
    """The options that an accuracy depends on; None, or the default, for those that it does not depend on.

    Attributes
    ----------
    epochs : int or None
        Passes over the images.
    views : int or None
        Views per image and seed.
    seed : int or None
        Seed of the run.
    crop_edge : {"clip", "zero"}
        Of the crops of views.
    kd_temperature, kd_weight : float
        Of mode ``kd``.
    projector_init : ProjectorInit or None
        Start of the trained projector.
    """

    epochs: int | None
    views: int | None
    seed: int | None
    crop_edge: CropEdge = "clip"
    kd_temperature: float = DEFAULT_KD_TEMPERATURE
    kd_weight: float = DEFAULT_KD_WEIGHT
    projector_init: ProjectorInit | None = None


def make_row_training_options(config: EvaluateOptions, mode: Mode, image_count: int) -> RowTrainingOptions:
    """Return the protocol of a mode on a number of images.

    Parameters
    ----------
    config : EvaluateOptions
    mode : Mode
    image_count : int
    """
    if mode == "inherit-statistics":
        return RowTrainingOptions(None, None, None)
    return RowTrainingOptions(
        epochs=None if mode == "inherit-ridge" else config.epochs,
        views=count_views_per_image_and_seed(config, mode, image_count),
        seed=config.seed,
        crop_edge=config.crop_edge,
        projector_init=get_projector_init(config, mode),
        **({"kd_temperature": config.kd_temperature, "kd_weight": config.kd_weight} if mode == "kd" else {}),
    )


def get_projector_init(config: EvaluateOptions, mode: Mode) -> ProjectorInit | None:
    """Return how a mode's projector starts; None for modes that train none."""
    if mode == "joint":
        return "default"
    return config.projector_init if mode in ("inherit", "stage") else None
