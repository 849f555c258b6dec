"""What `sfm evaluate` can be asked for."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Mode = Literal["linear", "inherit"]


class EvaluateConfig(BaseModel):
    """The configuration of one evaluation; the command line has one option per field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Path = Field(description="Directory that `sfm distill` wrote.", json_schema_extra={"argument": True})
    store: str = Field(description="Store the images were distilled from: a path or URL.")
    backbone: list[str] = Field(
        default=[],
        description="Backbone to evaluate on; repeat for several. Default: the one distilled on.",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Input size of the evaluation backbones, in pixels. Default: the size distilled at, "
        "where the store holds it.",
    )
    mode: list[Mode] = Field(
        default=["linear", "inherit"],
        min_length=1,
        description="What is trained on the images: linear (a fresh head) or inherit (a projector to the "
        "classifier that the store holds); repeat for several.",
    )
    seeds: int = Field(default=3, ge=1, description="Repetitions; the table shows mean and deviation.")
    epochs: int = Field(default=1000, ge=1, description="Passes over the synthetic images.")
    views: int = Field(
        default=50,
        ge=1,
        description="Augmented views per image and seed that linear heads are trained on, their features "
        "computed once; as many as epochs give every epoch a view of its own.",
    )
    projector_views: int = Field(
        default=300,
        ge=1,
        description="Views per image that the projectors of mode inherit are trained on; they have more "
        "weights to fit, and all seeds share the views.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where to compute.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of all randomness.")
