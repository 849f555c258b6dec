"""Seconds per step of the arms, in rounds that alternate between them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from comparison.step_time import time_in_rounds
from measurement import log_progress
from objective_comparison.arms import (
    ArmOptions,
    ArmRun,
    ComparedDataset,
    make_arm_config,
)
from objective_comparison.scored_runs import run_in_child

from sfm.api import Distiller
from sfm.atomic import atomic_write
from sfm.distill.pyramid import list_level_resolutions

SCHEDULE_OPTIONS = ("steps", "final_rate")
"""Options that the cost of a step does not depend on."""


MAX_TIMED_STEPS = 10_000
"""More steps than are timed."""


class StepCost(TypedDict):
    """Seconds of a step with all levels, and their ratio to plain SFM with as many images: medians."""

    seconds: float
    ratio: float


def make_step_key(options: ArmOptions) -> str:
    """Return a text that is equal for options whose steps cost the same."""
    relevant = {name: value for name, value in options.items() if name not in SCHEDULE_OPTIONS}
    return json.dumps(relevant, sort_keys=True)


def make_plain_options(options: ArmOptions) -> dict[str, Any]:
    """Return the options of SFM as published with as many images and views."""
    published = {"noisy_views": 0.5, "feature_decay": 0.0}
    return {name: options[name] for name in ("ipc", "views") if name in options} | published


def read_or_measure_step_costs(
    dataset: ComparedDataset, arms: Mapping[str, ArmOptions], work: Path, budget_seconds: float
) -> dict[str, StepCost]:
    """Return the cost of a step of every arm; those measured before are read from their file.

    So the number of steps of a run, which follows from them, is that of the first call.

    Parameters
    ----------
    budget_seconds : float
        Time to spend on the rounds of each number of images, about.
    """
    file = work / "step_costs" / f"{dataset.key}.json"
    costs: dict[str, StepCost] = json.loads(file.read_bytes()) if file.exists() else {}
    missing = [options for options in arms.values() if make_step_key(options) not in costs]
    for plain_key in dict.fromkeys(make_step_key(make_plain_options(options)) for options in missing):
        group = [o for o in missing if make_step_key(make_plain_options(o)) == plain_key]
        log_progress(f"{dataset.name}: timing steps of {len(group)} arms")
        costs |= run_in_child(time_steps_in_turn, dataset, group, budget_seconds)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(costs, indent=1).encode())
    return {arm: costs[make_step_key(options)] for arm, options in arms.items()}


def time_steps_in_turn(
    dataset: ComparedDataset, group: Sequence[ArmOptions], budget_seconds: float
) -> dict[str, StepCost]:
    """Return the cost of a step of plain SFM and of arms with as many images, by :func:`make_step_key`."""
    plain = make_plain_options(group[0])
    distillers = {
        make_step_key(options): make_full_pyramid_distiller(dataset, options) for options in (plain, *group)
    }
    device = next(iter(distillers.values())).backbone.device
    rounds = time_in_rounds(
        {key: distiller.step for key, distiller in distillers.items()}, budget_seconds, device
    )
    plain_key = make_step_key(plain)
    return {
        key: StepCost(
            seconds=statistics.median(seconds[key] for seconds in rounds),
            # In every round, other processes slow all arms alike.
            ratio=statistics.median(seconds[key] / seconds[plain_key] for seconds in rounds),
        )
        for key in distillers
    }


def make_full_pyramid_distiller(dataset: ComparedDataset, options: ArmOptions) -> Distiller:
    """Return a distiller whose pyramids have all their levels: the most expensive stage of a run."""
    every_step = {**options, "steps": MAX_TIMED_STEPS, "grow_every": 1}
    distiller = Distiller.from_config(
        make_arm_config(ArmRun(dataset, "tuning", "timed", (), every_step, 0), Path("unused"))
    )
    for _ in list_level_resolutions(distiller.config.canvas_pixels):
        distiller.step()
    return distiller
