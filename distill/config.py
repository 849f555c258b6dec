"""The config of ``sfm distill``. Imports no torch: the command line reads it at start-up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.execution.modes import ExecutionOption
from sfm.config_fields import (
    MAX_CANVAS_PIXELS,
    MAX_DISTILLATION_BACKBONES,
    MAX_IMAGES_PER_CLASS,
    MAX_ITERATIONS,
    MAX_PROCESSES,
    BackboneField,
    CanvasField,
    ClassesField,
    InMemoryCountField,
    LocationField,
    LossWeight,
    ProcessCountField,
    RecipeField,
)
from sfm.constrained_types import (
    MAX_INPUT_PIXELS,
    MAX_LABEL_TEMPERATURE,
    MAX_LABEL_VIEWS,
    MIN_LABEL_TEMPERATURE,
)
from sfm.paths import expand_home_in_path_or_list

CentreChoice = Annotated[
    Literal["sub-class", "class-mean", "class-average"],
    # Older versions had one name for two settings: they matched every image on its own.
    BeforeValidator(lambda value: "class-mean" if value == "none" else value),
]
"""What the images of a class are matched to."""


class DistillConfig(BaseModel):
    """One run of ``sfm distill``; also the ``config`` of its ``run.json``."""

    VALUES_OF_VERSION_0_1_0: ClassVar[Mapping[str, Any]] = {"feature_decay": 0.0, "noisy_views": 0.5}
    """Values of fields that a ``run.json`` of version 0.1.0 lacks, and whose defaults are others now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: LocationField[str] = Field(
        description="The store of statistics: a path or a URL (s3://, gs://, az://)."
    )
    backbone: BackboneField[list[str]] = Field(
        min_length=1,
        max_length=MAX_DISTILLATION_BACKBONES,
        description="The backbone whose statistics to match, e.g. lite0; repeat it to match several with the "
        "same images.",
    )
    backbone_weight: RecipeField[list[LossWeight]] = Field(
        default=[],
        description="Weight of a backbone's loss in the mean over all, from 1e-6 to 1e6; repeat it, one per "
        "--backbone (default: all equal).",
    )
    image_size: RecipeField[list[Annotated[int, Field(ge=8, le=MAX_INPUT_PIXELS)]] | None] = Field(
        default=None,
        description="Input size of the backbone, where the store holds several; one for all, or one per "
        "--backbone.",
    )
    dataset: RecipeField[str] = Field(
        description="NAME, NAME@DIGEST or NAME@tuning of the dataset in the store."
    )
    classes: ClassesField[Path | tuple[str, ...] | None] = Field(
        default=None,
        description="File with the ids or names of the classes to distil, one per line; default: all.",
    )
    out: LocationField[Path] = Field(description="Directory to write; must be new or empty, unless --resume.")
    objective: RecipeField[Literal["sfm", "sfm-decoupled", "sfm-corrected"]] = Field(
        default="sfm",
        description="sfm: cosine of the flows; sfm-decoupled: squared error of own and other-class centres; "
        "sfm-corrected: sfm between class means that are corrected for how heads are trained.",
    )
    alpha: RecipeField[float] = Field(
        default=1.0, ge=0, le=1, description="Weight of the own centres (sfm-decoupled only)."
    )
    feature_decay: RecipeField[float | None] = Field(
        default=None,
        ge=0,
        lt=1,
        description="Take the gradient of the loss at the moving average of the features over steps, with "
        "this decay (0: at the features of the step alone; default: the objective's).",
    )
    ipc: InMemoryCountField[int] = Field(
        default=1,
        ge=1,
        le=MAX_IMAGES_PER_CLASS,
        description="Images per class; above 1 the store must hold as many sub-class centres, unless "
        "--centres is another one.",
    )
    centres: RecipeField[CentreChoice] = Field(
        default="sub-class",
        description="What the images of a class are matched to, above one. sub-class: each to a centre of "
        "its own; class-mean: each to the mean of its class (none is the same); class-average: their average "
        "to the mean of the class, as in the published code.",
    )
    views: InMemoryCountField[int] = Field(
        default=1, ge=1, le=MAX_ITERATIONS, description="Augmented views of every image in every step."
    )
    steps: RecipeField[int] = Field(default=2000, ge=1, le=MAX_ITERATIONS, description="Optimisation steps.")
    learning_rate: RecipeField[float] = Field(
        default=2e-2, gt=0, allow_inf_nan=False, description="Learning rate of Adam, on the pyramid's levels."
    )
    final_rate: RecipeField[float | None] = Field(
        default=None,
        ge=0,
        le=1,
        description="Part of the learning rate that is left at the end: over the second half of the run it "
        "falls along half a cosine (default: 0.05; 1: it does not fall, as in the published code).",
    )
    grow_every: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_ITERATIONS,
        description="Steps between two levels of the pyramid (default: spread over half the run).",
    )
    micro_batch: InMemoryCountField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_ITERATIONS,
        description="Images whose activations are in memory at a time (default: as many as fit, at most 34 "
        "views, on a GPU 25).",
    )
    gradient: RecipeField[Literal["exact", "one-pass"]] = Field(
        default="exact",
        description="With several micro-batches: exact (one forward more) or one-pass (features of the other "
        "images are the last computed ones).",
    )
    graphs: InMemoryCountField[int | None] = Field(
        default=None,
        ge=0,
        le=MAX_ITERATIONS,
        description="With several micro-batches, exact: images whose graphs are kept while the others go "
        "forward, so that these go forward once (default: as many as take 120 MiB; on a GPU, those of one "
        "micro-batch).",
    )
    parametrization: RecipeField[Literal["pyramid", "pixels"]] = Field(
        default="pyramid",
        description="What images are made of. pyramid: levels of rising resolution; pixels: plain pixels.",
    )
    first_resolution: RecipeField[int] = Field(
        default=1,
        ge=1,
        le=MAX_CANVAS_PIXELS,
        description="Largest level that the pyramid has in the first step, in pixels.",
    )
    canvas_pixels: CanvasField[int | None] = Field(
        default=None,
        ge=8,
        le=MAX_CANVAS_PIXELS,
        description="Side of the images, in pixels (default: 8/7 of the largest input).",
    )
    start: RecipeField[Literal["noise", "zeros"]] = Field(
        default="noise",
        description="What a new level starts from. noise: random values; zeros: grey images, and later the "
        "levels that are there.",
    )
    color_decorrelation: RecipeField[bool] = Field(
        default=True,
        description="Optimise decorrelated colours instead of red, green and blue.",
    )
    augmentation: RecipeField[bool] = Field(
        default=True,
        description="Show the backbone random crops with flips and noise, instead of the whole images.",
    )
    noisy_views: RecipeField[float | None] = Field(
        default=None,
        ge=0,
        le=1,
        description="Part of the views that get Gaussian noise N(.5, .2^2) (default: 0; in the published "
        "code: 0.5). The views of sfm evaluate have none.",
    )
    crop_edge: RecipeField[CropEdge] = Field(
        default="clip",
        description="Crops that would be larger than the image are cut to it (clip), or show zeros outside "
        "of it (zero, as in the published code).",
    )
    checkpoint_every: RecipeField[int] = Field(
        default=100, ge=1, le=MAX_ITERATIONS, description="Steps between two checkpoints."
    )
    seed: RecipeField[int] = Field(
        default=0, ge=0, lt=2**63, description="Seed of the images' start and of the views."
    )
    device: RecipeField[Literal["auto", "cpu", "cuda"]] = Field(
        default="auto", description="Where to compute."
    )
    threads: RecipeField[int | None] = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="CPU threads to compute with, in each process. Default: one per core, or as "
        "OMP_NUM_THREADS says.",
    )
    precision: RecipeField[Literal["float32", "bf16"]] = Field(
        default="float32", description="Of the backbone's forward pass; bf16 is faster on a GPU."
    )
    execution: RecipeField[ExecutionOption] = Field(
        default="auto",
        description="Execution mode of the backbone: auto (the fastest here) or eager (plain PyTorch, "
        "no optimisations).",
    )
    compile: RecipeField[Literal["auto", "yes", "no"]] = Field(
        default="auto",
        description="Compile the backbone with torch.compile (auto: on a GPU, where the run is long enough "
        "to gain what that costs).",
    )
    devices: ProcessCountField[int] = Field(
        default=1,
        ge=1,
        le=MAX_PROCESSES,
        description="Number of processes that share the classes: on GPUs, one for each; on a CPU, each with "
        "its part of the threads.",
    )
    soft_labels: RecipeField[bool] = Field(
        default=False,
        description="Also write soft labels of the images, by the classifier of all real images, to "
        "labels.safetensors; `sfm evaluate --mode soft` trains on them. With --resume, for a finished run.",
    )
    label_views: RecipeField[int] = Field(
        default=50,
        ge=1,
        le=MAX_LABEL_VIEWS,
        description="Augmented views of an image that its soft label is averaged over (with --soft-labels).",
    )
    label_temperature: RecipeField[float] = Field(
        default=0.5,
        ge=MIN_LABEL_TEMPERATURE,
        le=MAX_LABEL_TEMPERATURE,
        description="Temperature of the soft labels: higher ones are softer (with --soft-labels).",
    )
    resume: RecipeField[bool] = Field(
        default=False, description="Resume from the last checkpoint in the directory."
    )

    dry_run: RecipeField[bool] = Field(
        default=False, description="Print what the run would do, how and at what size; write nothing."
    )

    _expand_out = field_validator("out")(expand_home_in_path_or_list)

    @field_validator("backbone", "backbone_weight", "image_size", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, list | tuple) else [value]

    @field_validator("backbone_weight", "image_size")
    @classmethod
    def _require_one_value_per_backbone(cls, values: list[Any] | None, info: ValidationInfo) -> Any:
        backbones = len(info.data.get("backbone", []))
        is_for_all = not values or (info.field_name == "image_size" and len(values) == 1)
        if values and backbones and not is_for_all and len(values) != backbones:
            found = f"{len(values)} value{'' if len(values) == 1 else 's'}"
            option = f"--{str(info.field_name).replace('_', '-')}"
            raise ValueError(f"{found} for {backbones} --backbone: give one {option} for each")
        return values

    @field_validator("first_resolution")
    @classmethod
    def _require_pyramid(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("parametrization") == "pixels":
            raise ValueError("plain pixels have no levels: leave it out, or --parametrization pixels")
        return value

    @field_validator("augmentation")
    @classmethod
    def _require_one_view_without_augmentation(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("views", 1) > 1:
            raise ValueError("without augmentation the views of an image are equal: leave out --views")
        return value

    @field_serializer("backbone", "image_size")
    def _unwrap_single_value(self, values: Any) -> Any:
        """Serialize the value of one backbone as readers of older versions expect it."""
        return values[0] if isinstance(values, list) and len(values) == 1 else values

    @property
    def image_size_of_each_backbone(self) -> list[int | None]:
        """Input sizes in the order of `backbone`; None where the store decides."""
        sizes: list[int | None] = [*self.image_size] if self.image_size else [None]
        return sizes * len(self.backbone) if len(sizes) == 1 else sizes

    @property
    def weight_of_each_backbone(self) -> list[float]:
        """Weights of the losses in the order of `backbone`."""
        return self.backbone_weight or [1.0] * len(self.backbone)
