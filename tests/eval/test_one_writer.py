"""Evaluations, exports and reports are written by one process at a time."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sfm import locking
from sfm.errors import InputError
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.evaluation import evaluate_runs_with_reader, evaluate_with_reader
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run_export import export
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report
from sfm.locking import lock_output_folder, lock_output_path


@pytest.fixture(autouse=True)
def _no_lock_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "MAX_WAIT_SECONDS", 0.0)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_concurrent_evaluation_of_a_run_is_refused(run: Path, fashion_store: str) -> None:
    with lock_output_folder(run), pytest.raises(InputError, match=r"run is being written by process \d+ on"):
        evaluate_with_reader(EvaluateConfig(run=run, store=fashion_store))


def test_a_run_given_twice_is_refused_before_locking(run: Path, fashion_store: str) -> None:
    short = {"mode": ["linear"], "epochs": 1, "views": 1, "seeds": 1, "device": "cpu"}
    twice = EvaluateRunsConfig.model_validate(
        {"run": [run, Path(os.path.relpath(run))], "store": fashion_store, **short}
    )
    with pytest.raises(InputError, match="run is given more than once"):
        evaluate_runs_with_reader(twice)


def test_a_folder_that_is_not_a_run_is_left_unchanged(tmp_path: Path, fashion_store: str) -> None:
    with pytest.raises(InputError, match="no run directory"):
        evaluate_with_reader(EvaluateConfig(run=tmp_path / "nothing", store=fashion_store))
    assert list(tmp_path.iterdir()) == []


def test_a_concurrent_export_into_one_folder_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    with lock_output_path(out), pytest.raises(InputError, match="exported is being written by process"):
        export(ExportConfig(run=run, format="imagefolder", out=out))
    assert not out.exists()
    export(ExportConfig(run=run, format="imagefolder", out=out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "run"]


def test_a_concurrent_report_into_one_file_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with lock_output_path(out), pytest.raises(InputError, match=r"report\.html is being written by process"):
        report(ReportConfig(runs=[run], out=out))
    report(ReportConfig(runs=[run], out=out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_run_on_a_read_only_mount_is_reported(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "--bind", "-o", "ro", str(run), str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        with lock_output_folder(place):
            assert not (place / locking.LOCK_NAME).exists()
        report(ReportConfig(runs=[place], out=tmp_path / "report.html"))
    finally:
        subprocess.run(["umount", str(place)], check=True)
