"""Cost of the statistics: estimated before, reported as progress, recorded after."""

import tarfile

import pytest
import torch

from sfm.pipeline.cost_model import (
    StatisticsProgress,
    estimate_statistics_operations,
    measure_statistics_operations_per_second,
)
from sfm.pipeline.dry_run import estimate_extraction
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig


def test_estimated_operations_grow_with_every_argument():
    least = estimate_statistics_operations(10, 64, 1000, 1, (5,)).total
    for more in ((20, 64, 1000, 1, (5,)), (10, 128, 1000, 1, (5,)), (10, 64, 9000, 1, (5,))):
        assert estimate_statistics_operations(*more).total > least
    assert estimate_statistics_operations(10, 64, 1000, 3, (5,)).total > least
    assert estimate_statistics_operations(10, 64, 1000, 1, (5, 10)).total > least
    assert estimate_statistics_operations(10, 64, 1000, 1, ()).sub_class_centres == 0


def test_operations_per_second_are_measured():
    assert measure_statistics_operations_per_second(3, 16, torch.device("cpu")) > 0


def test_progress_reports_each_percent_once_and_stays_within_a_phase():
    events = []
    cost = estimate_statistics_operations(2, 2000, 5000, 1, (5,))
    meter = StatisticsProgress(lambda event: events.append((event.done, event.figures)), "statistics", cost)
    meter.report_if_changed()
    meter.advance_within_phase(cost.total, cost.moments)
    meter.advance_within_phase(cost.total, cost.moments)
    meter.finish(figure=1.0)
    share = int(100 * cost.moments / cost.total)
    assert events == [(0, {}), (share, {}), (100, {"figure": 1.0})]


@pytest.fixture
def small_options(tmp_path):
    return {
        "source": "builtin:fashion-mnist-6k",
        "store": str(tmp_path / "store"),
        "backbone": ["lite0"],
        "image_size": 32,
        "limit_per_class": 3,
        "sub_classes": (2,),
    }


def test_a_dry_run_estimates_the_statistics_time(small_options):
    assert estimate_extraction(ExtractConfig(**small_options, dry_run=True)).statistics_seconds > 0


def test_a_dry_run_of_shards_estimates_the_statistics_time(small_options, tmp_path, image_folder):
    """Though only the pass tells how many classes there are."""
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
            for number, file in enumerate(sorted((image_folder / split).glob("*/*.png"))):
                (tmp_path / "x.txt").write_text(file.parent.name)
                archive.add(file, f"{number}.png")
                archive.add(tmp_path / "x.txt", f"{number}.txt")
    shards = f"wds:{tmp_path}/{{train,test}}-0.tar"
    planned = estimate_extraction(
        ExtractConfig(**(small_options | {"source": shards, "limit_per_class": None}), dry_run=True)
    )
    assert (planned.classes, planned.classes_met) == (None, 3)
    assert planned.statistics_seconds > 0


def test_statistics_progress_is_in_percent_and_its_time_is_recorded(small_options):
    events = []
    done = extract(ExtractConfig(**small_options, tune_fraction=0.4), events.append)
    for stage in ("statistics of lite0", "tuning statistics of lite0"):
        percents = [event.done for event in events if event.stage == stage]
        assert percents[0] == 0
        assert percents[-1] == 100
        assert percents == sorted(set(percents))
        assert {event.unit for event in events if event.stage == stage} == {"%"}
    seconds = [card.statistics_seconds for card in done.cards]
    assert all(s > 0 for s in seconds)
    assert done.statistics_seconds >= sum(seconds)
