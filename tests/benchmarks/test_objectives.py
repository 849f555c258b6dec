"""The comparison of objectives: its arms are configs of `sfm distill`, and its tables add up."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from objective_comparison.arms import (
    ArmOptions,
    ComparedDataset,
    compute_equal_time_steps,
    iter_arm_runs,
    list_matched_backbones,
    make_arm_config,
)
from objective_comparison.centres import measure_flow_cosine
from objective_comparison.comparison_tables import format_top1, summarize_rows
from objective_comparison.previews import draw_previews_side_by_side
from objective_comparison.step_costs import make_plain_options, make_step_key
from objectives import ARMS, remember_held_out_arms, require_no_other_held_out_arms
from PIL import Image

from sfm.distill.objective import ClassCentres
from sfm.errors import InputError

DATASET = ComparedDataset("garments", "store", 3)


def list_steps(options: ArmOptions, ratio: float) -> dict[tuple[str, ...], int]:
    """The steps of an arm that costs `ratio` times as much as plain SFM, by what they are equal to."""
    runs = iter_arm_runs(DATASET, "tuning", {"arm": options}, {"arm": ratio}, 1)
    return {run.budgets: make_arm_config(run, Path()).steps for run in runs}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config_of_the_tuning_entry(arm: str) -> None:
    (run,) = iter_arm_runs(DATASET, "tuning", {arm: ARMS[arm]}, {arm: 1.0}, 1)
    config = make_arm_config(run, Path("runs"))
    assert config.dataset == "garments@tuning"
    assert config.resume
    assert {name: getattr(config, name) for name in ARMS[arm]} == dict(ARMS[arm])


def test_held_out_data_are_those_of_the_whole_dataset() -> None:
    (run,) = iter_arm_runs(DATASET, "full", {"sfm": {}}, {"sfm": 1.0}, 1)
    assert make_arm_config(run, Path("runs")).dataset == "garments"


def test_runs_of_other_options_seeds_stores_or_entries_have_other_folders() -> None:
    options: list[ArmOptions] = [{}, {"ipc": 10}, {"backbone": ["lite0", "lite1"]}]
    datasets = [DATASET, ComparedDataset("garments", "other", 3)]
    names = [
        run.name
        for made in options
        for dataset in datasets
        for role in ("tuning", "full")
        for run in iter_arm_runs(dataset, role, {"arm": made}, {"arm": 1.0}, 2)  # type: ignore[arg-type]
    ]
    assert len(set(names)) == len(names) == 24


def test_an_arm_that_costs_twice_has_half_the_steps_in_equal_time() -> None:
    assert list_steps({"steps": 1000}, 2.0) == {("equal steps",): 1000, ("equal time",): 500}


def test_an_arm_that_costs_the_same_has_the_same_runs_for_both() -> None:
    assert list_steps({"steps": 1000}, 1.04) == {("equal steps", "equal time"): 1000}


def test_equal_time_never_means_no_step() -> None:
    assert compute_equal_time_steps(10, 100.0, 1.0) == 1


def test_schedules_do_not_change_what_a_step_costs() -> None:
    plain, long = {"ipc": 10}, {"ipc": 10, "steps": 4000, "final_rate": 0.05}
    assert make_step_key(plain) == make_step_key(long)
    assert make_step_key(plain) != make_step_key({"ipc": 10, "feature_decay": 0.9})
    assert make_plain_options({**long, "feature_decay": 0.9}) == {
        "ipc": 10,
        "noisy_views": 0.5,
        "feature_decay": 0.0,
    }


def make_row(seed: int, top1: dict[str, float], **others: Any) -> dict[str, Any]:
    row = {
        "dataset": "garments",
        "role": "tuning",
        "arm": "sfm",
        "seed": seed,
        "steps": 10,
        "ipc": 1,
        "seen": ["lite0"],
        "top1": top1,
        "real_cosine": dict.fromkeys(top1, 0.5),
        "target_cosine": {"lite0": 0.5},
        "loss": 0.5,
        "seconds": 2.0,
        "seconds_per_step": 0.2,
        "peak_bytes": 2**20,
        "budgets": ["equal steps"],
    }
    return row | others


def test_a_row_of_the_table_is_mean_and_sample_deviation_over_distillations() -> None:
    rows = [make_row(seed, {"lite0": top1, "lite1": 0.5}) for seed, top1 in enumerate((0.7, 0.8, 0.9))]
    (summary,) = summarize_rows(rows)
    mean, std = summary["top1"]["lite0"]
    assert (mean, std) == pytest.approx((0.8, math.sqrt(0.01)))
    assert summary["top1"]["lite1"] == (0.5, 0)
    assert (summary["distillations"], summary["seconds_per_step"]) == (3, pytest.approx(0.2))


def test_the_peak_of_a_row_is_the_largest() -> None:
    rows = [make_row(seed, {"lite0": 0.5}, peak_bytes=size) for seed, size in enumerate((5, 9, 7))]
    assert summarize_rows(rows)[0]["peak_bytes"] == 9


def test_runs_with_equal_steps_and_with_equal_time_are_rows_of_their_own() -> None:
    rows = [
        make_row(seed, {"lite0": top1}, steps=steps, budgets=budgets)
        for seed in range(2)
        for steps, budgets, top1 in ((10, ["equal steps"], 0.5), (5, ["equal time"], 0.3))
    ]
    found = [(each["steps"], each["budgets"], each["top1"]["lite0"]) for each in summarize_rows(rows)]
    assert found == [(10, ["equal steps"], (0.5, 0)), (5, ["equal time"], (0.3, 0))]


def test_backbones_that_the_images_were_not_matched_to_are_marked() -> None:
    (summary,) = summarize_rows(
        [make_row(0, {"lite0": 0.7, "lite1": 0.6, "lite2": 0.5}, seen=["lite0", "lite1"])]
    )
    assert [format_top1(summary, name) for name in ("lite0", "lite1", "lite2")] == [
        "70.0",
        "60.0",
        "50.0 unseen",
    ]


def test_images_are_matched_to_the_first_backbone_unless_the_arm_says_otherwise() -> None:
    assert list_matched_backbones({}) == ["lite0"]
    assert list_matched_backbones({"backbone": ["lite1", "lite2"]}) == ["lite1", "lite2"]


def test_held_out_data_are_read_for_one_choice_of_arms(tmp_path: Path) -> None:
    require_no_other_held_out_arms(tmp_path, ["sfm-long"])
    remember_held_out_arms(tmp_path, ["sfm", "corrected"])
    require_no_other_held_out_arms(tmp_path, ["corrected", "sfm"])
    with pytest.raises(InputError, match="read before, for other arms: repeat --held-out corrected sfm"):
        require_no_other_held_out_arms(tmp_path, ["sfm-long"])


def test_several_images_of_a_class_follow_its_mean_where_that_is_the_target() -> None:
    means = np.array([[1.0, 0.0], [0.0, 1.0]])
    apart = np.array([[[3.0, 5.0], [-1.0, -5.0]], [[0.0, 4.0], [0.0, -2.0]]])
    assert (apart.mean(axis=1) == means).all()
    one, several = ClassCentres(means, means[:, None]), ClassCentres(means, apart)
    assert measure_flow_cosine(several, one) == pytest.approx(1)
    assert measure_flow_cosine(several, ClassCentres(-means, -means[:, None])) == pytest.approx(-1)
    assert measure_flow_cosine(several, several) == pytest.approx(1)


def test_previews_are_side_by_side_below_their_captions(tmp_path: Path) -> None:
    for name, colour, size in (("plain", "red", (30, 20)), ("corrected", "blue", (30, 50))):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    captioned = [(name, tmp_path / f"{name}.png") for name in ("plain", "corrected")]
    draw_previews_side_by_side(captioned, tmp_path / "work" / "both.png")
    with Image.open(tmp_path / "work" / "both.png") as sheet:
        pixels = np.array(sheet)
    reds, blues = ((pixels == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert (reds.sum(), blues.sum()) == (30 * 20, 30 * 50)
    assert np.argwhere(reds)[:, 1].max() < np.argwhere(blues)[:, 1].min()
