"""What version 0.1.0 wrote goes on working: a run directory with its evaluation, kept from that version."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sfm.cli import app

RUN_OF_VERSION_0_1_0 = Path(__file__).parent / "run-0.1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN_OF_VERSION_0_1_0, tmp_path / "run"))


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_report_of_a_run_of_version_0_1_0_shows_its_accuracies(run: Path, tmp_path: Path) -> None:
    invoke("report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert f"{100 * row['top1_mean']:.1f}" in page


def test_a_run_of_version_0_1_0_is_exported(run: Path, tmp_path: Path) -> None:
    invoke("export", run, "--format", "imagefolder", "--out", tmp_path / "folder")
    kept = sorted(run.glob("images/*/*.png"))
    exported = sorted((tmp_path / "folder").rglob("*.png"))
    assert len(exported) == len(kept) == 10
    for one, other in zip(kept, exported, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_run_json_of_version_0_1_0_is_a_valid_distill_config(
    run: Path, fashion_store: str, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    invoke("distill", "--config", run / "run.json", "--store", fashion_store, "--out", out, "--quiet")
    before, after = (json.loads((folder / "run.json").read_text())["config"] for folder in (run, out))
    places = {"store", "out", "dataset", "classes"}
    assert {key: after[key] for key in before.keys() - places} == {
        key: before[key] for key in before.keys() - places
    }


def test_evaluation_json_of_version_0_1_0_is_a_valid_evaluate_config(run: Path, fashion_store: str) -> None:
    options = ("--config", run / "evaluation.json", "--store", fashion_store, "--mode", "inherit-statistics")
    result = CliRunner().invoke(app, ["evaluate", str(run), *map(str, options), "--json"])
    # The store holds other data than the run was distilled from: that is all that is wrong.
    assert result.exit_code == 2
    assert "distilled from" in result.output
