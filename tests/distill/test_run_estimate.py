"""What a dry run says is what the run then does."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sfm.cli import app
from sfm.distill.config import DistillConfig
from sfm.distill.run import distill
from sfm.distill.run_estimate import estimate_distillation
from sfm.errors import InputError


@pytest.mark.parametrize(
    "changes",
    [{}, {"ipc": 2, "views": 2, "micro_batch": 3, "gradient": "one-pass", "feature_decay": 0.5, "steps": 2}],
)
def test_a_dry_run_says_what_the_run_does(config: DistillConfig, changes: dict[str, object]) -> None:
    config = config.model_copy(update=changes)
    plan = estimate_distillation(config.model_copy(update={"dry_run": True}))
    assert not config.out.exists()
    record = distill(config).record
    resolved = record["resolved"]
    for key in ("objective", "steps", "views", "feature_decay", "micro_batch", "graphs", "threads"):
        assert getattr(plan, key) == resolved[key], key
    assert (plan.canvas, plan.images, plan.classes) == (record["canvas"], 4 * config.ipc, 4)
    (backbone,) = plan.backbones
    assert (backbone.backbone, backbone.entry_digest) == ("lite0", record["entry_digest"])
    assert {"mode": backbone.mode, "reason": backbone.reason} == record["execution"]
    tensors = load_file(next(config.out.glob("checkpoint/*/state.safetensors")))
    assert plan.checkpoint_bytes == sum(
        tensor.element_size() * math.prod(tensor.shape) for tensor in tensors.values()
    )


def test_a_dry_run_of_several_processes_starts_none(config: DistillConfig) -> None:
    plan = estimate_distillation(config.model_copy(update={"devices": 2}))
    assert (plan.devices, plan.micro_batch) == (2, 2)
    with pytest.raises(InputError, match="4 classes cannot be shared among 5 processes"):
        estimate_distillation(config.model_copy(update={"devices": 5}))


def test_a_dry_run_is_refused_where_the_run_would_be(config: DistillConfig) -> None:
    distill(config.model_copy(update={"steps": 1}))
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    with pytest.raises(InputError, match="holds a finished run"):
        estimate_distillation(config)
    with pytest.raises(InputError, match="steps was 1 and is 12 now"):
        estimate_distillation(config.model_copy(update={"resume": True}))
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before
    with pytest.raises(InputError, match="dry_run is set"):
        distill(config.model_copy(update={"dry_run": True}))


def test_the_command_prints_the_plan_of_two_backbones(
    fashion_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    backbones = ["--backbone", "lite0", "--backbone", "lite1", "--backbone-weight", "1"]
    command = ["distill", "--store", fashion_store, *backbones, "--backbone-weight", "0.5"]
    command += ["--dataset", "fashion-mnist-6k", "--out", str(out), "--feature-decay", "0.9", "--dry-run"]
    app(command, standalone_mode=False)
    lines = " ".join(capsys.readouterr().out.split())
    assert "10 of 10 classes, 37 px" in lines
    assert "sfm, feature decay 0.9" in lines
    assert "lite1 at 32 px, 1,280 features, weight 0.5, entry fashion-mnist-6k@" in lines
    assert "Nothing was written." in lines
    app([*command, "--json", "--quiet"], standalone_mode=False)
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [each["backbone"] for each in plan["backbones"]] == ["lite0", "lite1"]
    assert not out.exists()
