"""The comparison of knobs: each is one option of a command, and differences are between equal seeds."""

import io
from pathlib import Path
from typing import Any

import pytest
from knobs import GROUPS, KNOBS, Knob, Row, make_knob_protocol, make_knob_run, print_knobs, summarize_knobs
from objective_comparison.arms import ComparedDataset, make_arm_config
from objective_comparison.scored_runs import HeadTraining
from rich.console import Console

from sfm.api import DistillConfig, EvaluateConfig

DATASET = ComparedDataset("garments", "store", 3)


def make_config(knob: Knob) -> DistillConfig:
    return make_arm_config(make_knob_run(DATASET, knob, 0, 50), Path("runs"))


@pytest.mark.parametrize("group", GROUPS)
def test_a_knob_turns_one_option_of_one_command(group: str) -> None:
    first, *others = (knob for knob in KNOBS if knob.group == group)
    plain = make_config(first)
    assert others
    for knob in others:
        config = make_config(knob)
        changed = {
            name for name in DistillConfig.model_fields if getattr(config, name) != getattr(plain, name)
        }
        scored = {f"--{name}" for name in knob.kd_options or {}} | (
            {"--crop_edge"} if knob.crop_edge == "zero" else set()
        )
        option = group.replace("-", "_")
        assert changed - {"out"} <= {option}
        assert scored <= {f"--{option}"}
        assert changed or scored
        assert config.dataset == "garments@tuning"
        # The command line accepts what the benchmark sets.
        DistillConfig.model_validate(config.model_dump())
        EvaluateConfig(run=Path("run"), store="store", crop_edge=knob.crop_edge, **(knob.kd_options or {}))


def test_the_first_setting_of_every_knob_is_the_default() -> None:
    firsts = [next(knob for knob in KNOBS if knob.group == group) for group in GROUPS]
    assert {name for knob in firsts for name in knob.options} == {"ipc"}
    assert {knob.crop_edge for knob in firsts} == {"clip"}
    assert make_knob_protocol({}) == (4.0, 0.5)
    assert make_knob_protocol({"kd_weight": 0.0}) == (4.0, 0.0)


def test_knobs_of_evaluation_alone_share_the_distillation_of_the_default() -> None:
    names = {make_knob_run(DATASET, knob, 1, 50).name for knob in KNOBS}
    options = {tuple(sorted(knob.options.items())) for knob in KNOBS}
    assert len(names) == len(options) < len(KNOBS)
    assert HeadTraining().key != HeadTraining(crop_edge="zero").key


def make_row(setting: str, seed: int, top1: float, **others: Any) -> Row:
    row = {"knob": "start", "setting": setting, "dataset": "garments", "seed": seed, "steps": 9, "ipc": 1}
    scores = {"lite0": top1, "lite1": 0.5, "lite2": 0.25}
    return row | {"seen": ["lite0"], "top1": scores, "loss": 0.5, "seconds": 2.0} | others


def test_a_difference_is_that_of_distillations_of_the_same_seed() -> None:
    rows = [make_row("noise", 0, 0.6), make_row("noise", 1, 0.8), make_row("zeros", 1, 0.7)]
    rows.append(make_row("zeros", 0, 0.6))
    first, second = summarize_knobs([*rows, make_row("noise", 0, 0.1, dataset="birds")])[:2]
    assert first["difference"] is None
    assert second["top1"]["lite0"] == pytest.approx((0.65, 0.005**0.5))
    assert second["difference"]["lite0"] == pytest.approx((-0.05, 0.005**0.5))
    assert second["difference"]["lite1"] == (0, 0)


def test_the_table_shows_a_row_per_setting_with_its_difference() -> None:
    rows = [make_row("noise", 0, 0.6), make_row("zeros", 0, 0.525)]
    console = Console(file=io.StringIO(), width=140)
    print_knobs(console, summarize_knobs(rows))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (noise,) = (line for line in lines if " noise " in line)
    (zeros,) = (line for line in lines if " zeros " in line)
    assert "60.0" in noise
    assert "-" not in noise
    assert "52.5" in zeros
    assert "-7.5" in zeros
