"""The resolved configuration of a run: a value for everything that the user left open."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.execution.modes import ExecutionMode
from sfm.config_fields import (
    MAX_CANVAS_PIXELS,
    MAX_DISTILLATION_BACKBONES,
    MAX_IMAGES_PER_CLASS,
    MAX_ITERATIONS,
    MAX_PROCESSES,
    LossWeight,
)
from sfm.constrained_types import MAX_FEATURES, Digest, InputPixels, Name
from sfm.distill.config import CentreChoice
from sfm.distill.pyramid import (
    LevelStart,
    Parametrization,
    compute_canvas_size,
    list_level_resolutions,
)

UNKNOWN_EXECUTION_REASON = "as the run began"
"""Reason of the execution mode in runs of version 0.1.0, which did not record one."""

ThreadCount = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]


class ExecutionChoice(BaseModel):
    """An execution mode and why it was chosen."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    mode: ExecutionMode
    reason: Name


class MatchedBackbone(BaseModel):
    """A backbone that the images of a run are matched to.

    Attributes
    ----------
    dataset : str
        Digest of the store's entry.
    backbone : str
        Backbone hash.
    image_size : int
        Side of its views, in pixels.
    weight : float
        Of its loss.
    execution : ExecutionChoice
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    dataset: Name
    backbone: Name
    image_size: InputPixels
    weight: LossWeight
    execution: ExecutionChoice = ExecutionChoice(mode="input-grad", reason=UNKNOWN_EXECUTION_REASON)


class ResolvedDistillConfig(BaseModel):
    """Everything that shapes the images of a run, by the name of the option that sets it.

    A run is resumed only with an equal one, except for `threads`. ``run.json`` keeps it as ``resolved``, a
    checkpoint as ``recipe``. Bounds are checked because the files are untrusted.

    Attributes
    ----------
    dataset : str
        Digest of the store's entry; of several backbones, of the first one's.
    classes : list of str
        Class ids, C of them, in the entry's order.
    backbone : str
        Hash of the first backbone.
    image_size : int
        Side of the first backbone's views, in pixels: its input.
    weight : float
        Of the first backbone's loss.
    further_backbones : list of MatchedBackbone
        The backbones after the first.
    feature_decay : float
        Decay of the moving average of the features at which the gradient is taken; 0: there is none.
    targets : str or None
        Digest of the targets that the objective computed from the entries, if it does.
    ipc, views : int
        K and A: images per class, and views of each image per step.
    grow_every : int
        Steps between two levels of the pyramid.
    canvas_pixels : int
        Side of the images, in pixels.
    micro_batch, graphs : int
        See :class:`~sfm.distill.train_step.MicroBatching`.
    device : str
        Type of the device.
    devices : int
        Processes that share the classes.
    threads : int
        CPU threads of each process. Another number gives other last bits.
    threads_before : list of int
        Earlier values of `threads`, if the run was resumed with another number.
    execution : ExecutionChoice
        How the first backbone is computed, and why.
    repeatable : bool
        Whether the device computes the same bits every time.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    dataset: Name
    classes: Annotated[list[Name], Field(fail_fast=True, min_length=1)]
    backbone: Name
    image_size: InputPixels
    objective: Literal["sfm", "sfm-decoupled", "sfm-corrected"]
    alpha: Annotated[float, Field(ge=0, le=1)]
    ipc: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
    centres: CentreChoice
    views: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
    steps: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    final_rate: Annotated[float, Field(ge=0, le=1)]
    grow_every: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    micro_batch: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
    gradient: Literal["exact", "one-pass"]
    graphs: Annotated[int, Field(ge=0, le=MAX_ITERATIONS)]
    device: Name
    precision: Literal["float32", "bf16"]
    devices: Annotated[int, Field(ge=1, le=MAX_PROCESSES)]
    threads: ThreadCount
    threads_before: Annotated[list[ThreadCount], Field(max_length=1000)] = []
    execution: ExecutionChoice = ExecutionChoice(mode="input-grad", reason=UNKNOWN_EXECUTION_REASON)
    repeatable: bool = True
    weight: LossWeight = 1.0
    further_backbones: Annotated[
        list[MatchedBackbone], Field(fail_fast=True, max_length=MAX_DISTILLATION_BACKBONES - 1)
    ] = []
    feature_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Digest | None = None
    parametrization: Parametrization = "pyramid"
    first_resolution: Annotated[int, Field(ge=1, le=MAX_CANVAS_PIXELS)] = 1
    canvas_pixels: Annotated[int, Field(ge=1, le=MAX_CANVAS_PIXELS)]
    start: LevelStart = "noise"
    color_decorrelation: bool = True
    augmentation: bool = True
    crop_edge: CropEdge = "clip"

    @model_validator(mode="before")
    @classmethod
    def _upgrade_execution_fields(cls, values: Any) -> Any:
        """Convert the two flags of version 0.1.0 to `execution`."""
        if isinstance(values, dict) and "execution" not in values:
            is_captured, is_compiled = bool(values.get("captured")), bool(values.get("compiled"))
            mode = "compiled" if is_compiled else "cuda-graph" if is_captured else "input-grad"
            return values | {"execution": {"mode": mode, "reason": UNKNOWN_EXECUTION_REASON}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _compute_missing_canvas(cls, values: Any) -> Any:
        """Compute the side of the images, which version 0.1.0 did not record, from the inputs."""
        if not isinstance(values, dict) or "canvas_pixels" in values:
            return values
        further = values.get("further_backbones", [])
        inputs = [values.get("image_size")]
        for each in further if isinstance(further, list) else ():
            if isinstance(each, MatchedBackbone):
                inputs.append(each.image_size)
            elif isinstance(each, dict):
                inputs.append(each.get("image_size"))
        sizes = [size for size in inputs if isinstance(size, int) and 0 < size <= MAX_CANVAS_PIXELS]
        return values | {"canvas_pixels": compute_canvas_size(max(sizes))} if sizes else values

    @property
    def image_count(self) -> int:
        """Number of images, C * K."""
        return len(self.classes) * self.ipc

    @property
    def matched_backbones(self) -> list[MatchedBackbone]:
        """All backbones that the images are matched to, the first included."""
        first = MatchedBackbone(
            dataset=self.dataset,
            backbone=self.backbone,
            image_size=self.image_size,
            weight=self.weight,
            execution=self.execution,
        )
        return [first, *self.further_backbones]

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Sides of all levels of the pyramid, in pixels; one level where images are plain pixels."""
        return list_level_resolutions(self.canvas_pixels, self.parametrization)

    def count_levels_at(self, step: int) -> int:
        """Return the number of levels of the pyramid in a step (the first is step 0)."""
        first_count = count_first_levels(self.level_resolutions, self.first_resolution)
        return min(len(self.level_resolutions), first_count + step // self.grow_every)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step (the first is step 0).

        It is constant for half of the run; over the other half it falls along half a cosine.
        """
        progress = max(0.0, 2 * (step + 1) / self.steps - 1)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)

    def compute_max_state_bytes(self) -> int:
        """Return the maximum size of the tensors of a state, in bytes."""
        pixels = sum(side**2 for side in self.level_resolutions)
        features = (1 + len(self.further_backbones)) * (self.views + 1) * MAX_FEATURES
        # Levels with two moments each, the last features and their average, and the optimizer's steps.
        return 4 * self.image_count * (3 * 3 * pixels + features) + 8

    def with_executions(self, executions: Sequence[ExecutionChoice]) -> "ResolvedDistillConfig":
        """Return the config with other execution modes, one per backbone."""
        further = [
            backbone.model_copy(update={"execution": execution})
            for backbone, execution in zip(self.further_backbones, executions[1:], strict=True)
        ]
        return self.model_copy(update={"execution": executions[0], "further_backbones": further})

    def with_threads(self, threads: int) -> "ResolvedDistillConfig":
        """Return the config of this run resumed with another number of threads; earlier numbers are kept."""
        if threads == self.threads:
            return self
        before = [*self.threads_before, self.threads]
        return self.model_copy(update={"threads": threads, "threads_before": before})


def count_first_levels(level_resolutions: Sequence[int], first_resolution: int) -> int:
    """Return the number of levels in the first step: those of up to a resolution, at least the first one."""
    return max(1, sum(side <= first_resolution for side in level_resolutions))


def choose_growth_interval(steps: int, stage_count: int) -> int:
    """Return steps between two levels such that the stages share the first half of a run: ``steps / (2 L)``.

    The last stage has the second half as well: its finest level has the most values to optimize.

    Parameters
    ----------
    steps : int
        Of the run.
    stage_count : int
        Numbers of levels that the pyramid has in turn, L: that of all levels, if it begins with one.
    """
    return max(1, steps // (2 * stage_count))
