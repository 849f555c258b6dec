"""The arms of the comparison of objectives, and the runs of `sfm distill` that they stand for."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfm.api import DistillConfig

IMAGE_SIZE = 96
EVALUATED_BACKBONES = ("lite0", "lite1", "lite2")
DEFAULT_STEPS = 2000

EQUAL_COST = 0.05
"""Arms whose steps cost as much as those of plain SFM, but for this share, have as many in equal time."""

NOMINAL_SECONDS_PER_VIEW = 0.003
"""Forward and backward of one view through lite0, on two cores."""

NOMINAL_SECONDS_PER_SCORED_IMAGE = 2.5
"""Views of one image through all evaluated backbones, and its share of training heads."""

ArmOptions = Mapping[str, Any]
"""Fields of DistillConfig that an arm sets."""

Budget = Literal["equal steps", "equal time"]
DistilledRole = Literal["tuning", "full"]


@dataclass(frozen=True)
class ComparedDataset:
    """The statistics of a dataset.

    Attributes
    ----------
    name : str
        In the store.
    store : str
    classes : int
    """

    name: str
    store: str
    classes: int

    @property
    def key(self) -> str:
        """Text that names files of the dataset: another store has another one."""
        return f"{self.name}-{hashlib.sha256(self.store.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ArmRun:
    """One distillation of an arm.

    Attributes
    ----------
    dataset : ComparedDataset
    role : {"tuning", "full"}
        Of the entry: choices are made on "tuning", "full" is scored on held-out data.
    arm : str
    budgets : tuple of str
        What its number of steps is equal to: that of the arm, or the time of plain SFM, or both.
    options : mapping
        Fields of DistillConfig, with the number of steps.
    seed : int
    """

    dataset: ComparedDataset
    role: DistilledRole
    arm: str
    budgets: tuple[Budget, ...]
    options: ArmOptions
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder: another store or another option gives another one."""
        digest = hashlib.sha256(json.dumps(dict(self.options), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.dataset.key}-{self.role}-{self.arm}-{digest}-{self.seed}"


def list_matched_backbones(options: ArmOptions) -> list[str]:
    """Return the backbones that the images of an arm are matched to; the others are unseen."""
    backbones = options.get("backbone", EVALUATED_BACKBONES[0])
    return [backbones] if isinstance(backbones, str) else list(backbones)


def make_arm_config(run: ArmRun, runs_folder: Path) -> DistillConfig:
    """Return the config of a run, which resumes in its folder."""
    return DistillConfig(
        **{"backbone": EVALUATED_BACKBONES[0], "image_size": IMAGE_SIZE, **run.options},
        store=run.dataset.store,
        dataset=f"{run.dataset.name}@tuning" if run.role == "tuning" else run.dataset.name,
        out=runs_folder / run.name,
        seed=run.seed,
        resume=True,
    )


def compute_equal_time_steps(steps: int, seconds_per_step: float, plain_seconds_per_step: float) -> int:
    """Return the steps that an arm does in the time in which plain SFM does `steps`."""
    ratio = plain_seconds_per_step / seconds_per_step
    return steps if abs(1 / ratio - 1) <= EQUAL_COST else max(1, round(steps * ratio))


def iter_arm_runs(
    dataset: ComparedDataset,
    role: DistilledRole,
    arms: Mapping[str, ArmOptions],
    cost_ratios: Mapping[str, float],
    seeds: int,
) -> Iterator[ArmRun]:
    """Yield the runs of arms, with equal steps and with equal time; one that is both comes once.

    Parameters
    ----------
    cost_ratios : mapping of str to float
        By arm: seconds per step, in multiples of those of plain SFM with as many images.
    seeds : int
        Distillations of each arm.
    """
    for arm, options in arms.items():
        steps = options.get("steps", DEFAULT_STEPS)
        steps_by_budget: dict[Budget, int] = {
            "equal steps": steps,
            "equal time": compute_equal_time_steps(steps, cost_ratios[arm], 1.0),
        }
        for count in dict.fromkeys(steps_by_budget.values()):
            budgets = tuple(budget for budget, own in steps_by_budget.items() if own == count)
            for seed in range(seeds):
                yield ArmRun(dataset, role, arm, budgets, {**options, "steps": count}, seed)


def estimate_run_seconds(run: ArmRun) -> float:
    """Return a rough time of distilling and scoring a run on two cores."""
    images = run.dataset.classes * run.options.get("ipc", 1)
    views = images * run.options.get("views", 1) * run.options["steps"]
    distilling = views * len(list_matched_backbones(run.options)) * NOMINAL_SECONDS_PER_VIEW
    return distilling + images * NOMINAL_SECONDS_PER_SCORED_IMAGE


def select_arms(arms: Mapping[str, ArmOptions], names: Sequence[str] | None) -> dict[str, ArmOptions]:
    """Return the named arms in the order of the table; all if no names are given."""
    return {name: options for name, options in arms.items() if names is None or name in names}
