"""What every command has from `sfm.command`: options of one value are given once."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from sfm.cli import app
from sfm.distill.config import DistillConfig
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.export.config import ExportConfig
from sfm.eval.report.config import ReportConfig


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that is refused; return its one line."""
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert (end.value.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["distill", "--store", "s", "--backbone", "a", "--backbone", "b", "--dataset", "d"], "--backbone"),
        (["distill", "--store", "s", "--backbone", "a", "--store=t", "--dataset", "d"], "--store"),
        (["distill", "--config", "run.json", "--config", "other.json"], "--config"),
        (["extract", "folder:x", "--store", "s", "--backbone", "a", "--seed", 1, "--seed", 1], "--seed"),
        (["evaluate", "run", "--store", "s", "--epochs", 1, "--epochs", 2], "--epochs"),
        (["report", "run", "--out", "a.html", "--out", "b.html"], "--out"),
        (["export", "run", "--format", "parquet", "--format", "webdataset", "--out", "x"], "--format"),
        (["quickstart", "--out", "a", "--out", "b"], "--out"),
        (["store", "show", "s", "d", "--backbone", "a", "--backbone", "b"], "--backbone"),
        (["store", "verify", "s", "--dataset", "a", "--dataset", "b"], "--dataset"),
        (["store", "copy", "s", "t", "--image-size", 1, "--image-size", 2], "--image-size"),
        (["store", "merge", "s", "a", "b", "--name", "x", "--name", "y"], "--name"),
        (["store", "rm", "s", "d", "--backbone", "a", "--backbone", "b"], "--backbone"),
        (["store", "gc", "s", "--older-than", "1d", "--older-than", "2d"], "--older-than"),
    ],
)
def test_an_option_of_one_value_that_is_given_twice_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    option: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, *arguments) == (
        f"error: {option} takes one value and is given 2 times: give it once"
    )
    assert list(tmp_path.iterdir()) == []


def test_options_of_several_values_and_switches_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", "nowhere", "--store", "s", "--backbone", "a", "--backbone", "b"]
    assert "no run directory" in refusal(capsys, *evaluate, "--save", "--save", "--quiet")


@pytest.mark.parametrize(
    "config",
    [
        EvaluateConfig(run="~/run", store="s", out="~/r.json"),
        EvaluateRunsConfig(run=["~/run"], store="s", out="~/r.json").each()[0],
        DistillConfig(store="s", backbone="lite0", dataset="d", out="~/run"),
        ReportConfig(runs=["~/run"], out="~/r.html", evaluation=["~/r.json"]),
        ExportConfig(run="~/run", format="parquet", out="~/x"),
    ],
)
def test_a_path_in_the_home_folder_may_be_given_with_a_tilde(config: BaseModel) -> None:
    paths = [value for _, value in config if isinstance(value, Path)]
    paths += [
        path for _, value in config if isinstance(value, list) for path in value if isinstance(path, Path)
    ]
    assert paths
    assert [path for path in paths if not path.is_relative_to(Path.home())] == []
