import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfm.backbones.build import Backbone
from sfm.distill import kernels
from sfm.distill.config import DistillConfig
from sfm.distill.engine import Plan
from sfm.distill.kernels import COMPILE_FROM, Kernels, is_worth_compiling, quickened
from sfm.distill.run import distill
from sfm.errors import InputError
from sfm.events import Progress

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAN = Plan(
    classes=4,
    ipc=1,
    views=1,
    image_size=32,
    steps=10,
    learning_rate=0.02,
    final_rate=1.0,
    grow_every=2,
    seed=0,
    micro_batch=2,
    gradient="exact",
    graphs=0,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_long_run_is_worth_compiling_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    long = replace(PLAN, steps=COMPILE_FROM // 4)
    assert not is_worth_compiling(long, "auto", CPU)
    monkeypatch.setattr(kernels, "can_compile", lambda device: device.type == "cuda")
    assert is_worth_compiling(long, "auto", GPU)
    assert not is_worth_compiling(PLAN, "auto", GPU)
    assert not is_worth_compiling(long, "no", GPU)
    assert is_worth_compiling(PLAN, "yes", GPU)


def test_what_cannot_be_compiled_is_refused_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_compile", lambda device: False)
    with pytest.raises(InputError, match="Triton"):
        is_worth_compiling(PLAN, "yes", GPU)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(InputError, match="compiler"):
        is_worth_compiling(PLAN, "yes", CPU)


def fail(*_: object) -> None:
    raise RuntimeError("no such kernel\nand a long story")


def test_a_compiler_that_fails_is_told_of_if_it_was_asked_for_and_done_without_else(
    lite0: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compiled", fail)
    monkeypatch.setattr(kernels, "is_worth_compiling", lambda *_: True)
    _, how = quickened(lite0, PLAN, "auto")
    assert not how.compiled
    with pytest.raises(InputError, match=r"no such kernel$"):
        quickened(lite0, PLAN, "yes")


def test_on_a_cpu_nothing_is_compiled_or_recorded(lite0: Backbone) -> None:
    assert quickened(lite0, PLAN, "auto")[1] == Kernels(compiled=False, captured=False)


class PulledPlugError(Exception):
    pass


def pull_the_plug(event: Progress) -> None:
    if event.stage == "distil" and event.done == 5:
        raise PulledPlugError


@needs_gpu
@pytest.mark.parametrize(
    "options", [{}, {"compile": "yes"}, {"precision": "bf16"}, {"graphs": 4}, {"gradient": "one-pass"}]
)
def test_a_run_on_a_gpu_that_is_resumed_ends_with_the_same_bits(
    config: DistillConfig, tmp_path: Path, options: dict[str, object]
) -> None:
    def asked(name: str, **more: object) -> DistillConfig:
        cut = {"device": "cuda", "micro_batch": 3, "steps": 12, "checkpoint_every": 4}
        return config.model_copy(update=cut | options | {"out": tmp_path / name} | more)

    undisturbed = distill(asked("undisturbed")).record
    assert undisturbed["kernels"]["repeatable"]
    assert undisturbed["kernels"]["captured"] == ("graphs" not in options)
    assert undisturbed["kernels"]["compiled"] == ("compile" in options)
    with pytest.raises(PulledPlugError):
        distill(asked("cut"), pull_the_plug)
    resumed = distill(asked("cut", resume=True)).record
    assert resumed["images"] == undisturbed["images"]
    both = [(tmp_path / name / "run.json").read_text() for name in ("undisturbed", "cut")]
    assert json.loads(both[0])["loss"] == json.loads(both[1])["loss"]
