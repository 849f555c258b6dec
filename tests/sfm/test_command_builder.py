"""What all commands share: options that are given once, and `--config`, which gives a recipe."""

import json
import os
import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from sfm.cli import app
from sfm.command_builder import make_config_from_file_and_options
from sfm.config_fields import get_config_file_rule
from sfm.distill.config import DistillConfig
from sfm.errors import InputError
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.export.config import ExportConfig
from sfm.eval.report.config import ReportConfig
from sfm.pipeline.extract_config import ExtractConfig


def run_refused_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that is refused; return its one line."""
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert (end.value.code, output.out) == (2, "")
    (line,) = output.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["distill", "--store", "s", "--seed", 1, "--dataset", "d", "--seed", 1], "--seed"),
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
def test_repeated_single_value_option_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    option: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_refused_command(capsys, *arguments) == (
        f"error: {option} takes one value and is given 2 times: give it once"
    )
    assert list(tmp_path.iterdir()) == []


def test_multi_value_options_and_flags_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", "nowhere", "--store", "s", "--backbone", "a", "--backbone", "b"]
    assert "no run directory" in run_refused_command(capsys, *evaluate, "--save", "--save", "--quiet")


@pytest.mark.parametrize(
    "config",
    [
        EvaluateConfig(run="~/run", store="s", out="~/r.json"),
        EvaluateRunsConfig(run=["~/run"], store="s", out="~/r.json").split_by_run()[0],
        DistillConfig(store="s", backbone="lite0", dataset="d", out="~/run"),
        ReportConfig(runs=["~/run"], out="~/r.html", evaluation=["~/r.json"]),
        ExportConfig(run="~/run", format="parquet", out="~/x"),
    ],
)
def test_config_paths_expand_a_leading_tilde(config: BaseModel) -> None:
    paths = [value for _, value in config if isinstance(value, Path)]
    paths += [
        path for _, value in config if isinstance(value, list) for path in value if isinstance(path, Path)
    ]
    assert paths
    assert [path for path in paths if not path.is_relative_to(Path.home())] == []


CONFIGS = [DistillConfig, EvaluateConfig, EvaluateRunsConfig, ExportConfig, ExtractConfig, ReportConfig]
RECIPE = {"backbone": "lite0", "dataset": "birds", "steps": 7}
PLACES = {"store": "/their/store", "out": "/home/you", "classes": "/etc/passwd"}


def write_config_file(tmp_path: Path, config: object, command: str = "distill") -> Path:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"command": command, "config": config}))
    return file


@pytest.mark.parametrize("model", CONFIGS)
def test_every_config_field_declares_a_config_file_rule(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert get_config_file_rule(field), name


def test_every_public_config_model_is_tested_here() -> None:
    import sfm.api

    values = [getattr(sfm.api, name) for name in dir(sfm.api)]
    public = {value for value in values if isinstance(value, type) and issubclass(value, BaseModel)}
    configs = {model for model in public if model.__name__.endswith("Config")}
    # A resolved config is what a run came out with: no command takes it from a file.
    assert {model for model in configs if not model.__name__.startswith("Resolved")} == set(CONFIGS)


def test_untrusted_config_file_supplies_the_recipe_and_options_supply_the_paths(tmp_path: Path) -> None:
    file = write_config_file(tmp_path, {**RECIPE, **PLACES})
    own = {"store": "mine", "out": tmp_path / "out", "classes": tmp_path / "classes.txt"}
    found = make_config_from_file_and_options(DistillConfig, "distill", file, dict(own))
    recipe = DistillConfig.VALUES_OF_VERSION_0_1_0 | RECIPE
    assert found == DistillConfig(**recipe, **own)
    assert make_config_from_file_and_options(
        DistillConfig, "distill", file, {}, is_file_trusted=True
    ) == DistillConfig(**recipe, **PLACES)


def test_paths_in_an_untrusted_config_file_are_refused_with_both_remedies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config_file(tmp_path, {**RECIPE, **PLACES})
    line = run_refused_command(capsys, "distill", "--config", file, "--store", "mine")
    assert line.endswith(
        "sets --classes /etc/passwd, --out /home/you: a file gives the recipe only, of usual size; give "
        "--classes --out on the command line, or --trust-config if the file is your own"
    )


@pytest.mark.parametrize(
    ("command", "config", "named"),
    [
        ("extract", {"scheduler": "tcp://theirs:8786"}, "--scheduler tcp://theirs:8786"),
        ("extract", {"source": "folder:/home/you"}, "DATASET"),
        ("extract", {"staging": "/home/you"}, "--staging"),
        ("extract", {"exemplars": 8}, "--exemplars 8"),
        ("extract", {"keep_train_features": True}, "--keep-train-features"),
        ("extract", {"replace": True}, "--replace"),
        ("extract", {"backbone": ["lite0", "timm/vit_base@/home/you/weights.pth"]}, "--backbone"),
        ("distill", {"backbone": "timm/vit_base@/home/you/weights.pth"}, "--backbone"),
        ("evaluate", {"run": ["/home/you/run"]}, "RUN"),
        ("evaluate", {"out": "/home/you"}, "--out"),
        ("report", {"evaluation": ["/home/you"]}, "--evaluation"),
        ("report", {"runs": ["/home/you/run"]}, "DIR"),
        ("export", {"out": "/home/you"}, "--out"),
        ("distill", {"devices": 4096}, "--devices 4096"),
        ("distill", {"ipc": 10_000}, "--ipc 10000"),
        ("distill", {"views": "1000000"}, "--views 1000000"),
        ("distill", {"views": 1e6}, "--views 1000000.0"),
        ("distill", {"micro_batch": 10**9, "graphs": 10**9}, "--micro-batch 1000000000"),
        ("evaluate", {"seeds": 10**9}, "--seeds 1000000000"),
        ("evaluate", {"views": 10**9, "projector_views": 10**9}, "--views 1000000000, --projector-views"),
        ("extract", {"workers": 4096}, "--workers 4096"),
    ],
)
def test_unsafe_fields_in_an_untrusted_config_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, config: dict[str, object], named: str
) -> None:
    line = run_refused_command(capsys, command, "--config", write_config_file(tmp_path, config, command))
    assert f"sets {named}" in line
    assert "a file gives the recipe only" in line


def test_null_and_disabled_fields_in_an_untrusted_config_file_are_accepted(tmp_path: Path) -> None:
    off = {"staging": None, "scheduler": None, "exemplars": 0, "replace": False, "backbone": ["lite0"]}
    found = make_config_from_file_and_options(
        ExtractConfig, "extract", write_config_file(tmp_path, off, "extract"), {"source": "x", "store": "s"}
    )
    assert found.model_dump()["exemplars"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "is not a run.json"),
        (b'{"command": "distill", "config": [[1, 2]]}', "is not a run.json"),
        (b'{"command": "x\\u001b[2J", "config": {}}', r"is of `sfm x\x1b[2J`"),
        (b'{"command": "' + b"x" * 10**6 + b'", "config": {}}', "x…`, not of"),
        (
            b'{"command": "distill", "config": {"steps": 1000000000000}}',
            "--steps 1000000000000: input should be less",
        ),
        (b'{"command": "distill", "config": {"seed": ' + b"9" * 4000 + b"}}", "--seed 999"),
        (b'{"command": "distill", "config": {"learning_rate": NaN}}', "--learning-rate nan"),
        (
            b'{"command": "distill", "config": {' + b",".join(b'"a%d": 1' % i for i in range(999)) + b"}}",
            "'a2'",
        ),
    ],
)
def test_invalid_config_file_gives_a_short_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    (tmp_path / "run.json").write_bytes(text)
    line = run_refused_command(
        capsys, "distill", "--config", tmp_path / "run.json", "--store", "s", "--out", tmp_path / "o"
    )
    assert message in line
    assert len(line) < 1500


def test_config_file_can_be_an_inherited_pipe(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    writer = threading.Timer(0.2, lambda: os.write(writable, file.read_bytes()) and os.close(writable))
    file = write_config_file(tmp_path, RECIPE)
    writer.start()
    given = {"store": "mine", "out": tmp_path}
    found = make_config_from_file_and_options(DistillConfig, "distill", Path(f"/dev/fd/{readable}"), given)
    writer.join()
    os.close(readable)
    recipe = DistillConfig.VALUES_OF_VERSION_0_1_0 | RECIPE
    assert found == DistillConfig(**recipe, store="mine", out=tmp_path)


def test_named_pipe_as_config_file_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(InputError, match="it is not a regular file"):
        make_config_from_file_and_options(DistillConfig, "distill", tmp_path / "run.json", {})
