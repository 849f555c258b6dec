import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfm.backbones.build import Backbone
from sfm.distill import kernels, run
from sfm.distill.config import DistillConfig
from sfm.distill.engine import Plan
from sfm.distill.group import Group
from sfm.distill.kernels import COMPILE_FROM, Kernels, is_worth_compiling, quickened, wanted_kernels
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
    assert not is_worth_compiling("auto", COMPILE_FROM, CPU)
    monkeypatch.setattr(kernels, "can_compile", lambda device: device.type == "cuda")
    assert is_worth_compiling("auto", COMPILE_FROM, GPU)
    assert not is_worth_compiling("auto", COMPILE_FROM - 1, GPU)
    assert not is_worth_compiling("auto", COMPILE_FROM, GPU, Group(0, 2))
    assert not is_worth_compiling("no", COMPILE_FROM, GPU)
    assert is_worth_compiling("yes", 1, GPU)


def test_what_cannot_be_compiled_is_refused_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="one process on a GPU"):
        is_worth_compiling("yes", 1, CPU)
    with pytest.raises(InputError, match="one process on a GPU"):
        is_worth_compiling("yes", 1, GPU, Group(0, 2))
    monkeypatch.setattr(kernels, "can_compile", lambda device: False)
    with pytest.raises(InputError, match="Triton"):
        is_worth_compiling("yes", 1, GPU)
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    with pytest.raises(InputError, match="--graphs"):
        wanted_kernels(replace(PLAN, graphs=4), "yes", GPU)


def test_a_gpu_records_a_run_of_one_process_that_keeps_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    assert wanted_kernels(PLAN, "auto", GPU) == Kernels(compiled=False, captured=True)
    long = replace(PLAN, steps=COMPILE_FROM)
    assert wanted_kernels(long, "auto", GPU) == Kernels(compiled=True, captured=True)
    for none in (wanted_kernels(replace(long, graphs=4), "auto", GPU), wanted_kernels(long, "auto", CPU)):
        assert none == Kernels(compiled=False, captured=False)
    assert wanted_kernels(long, "auto", GPU, Group(0, 2)) == Kernels(compiled=False, captured=False)


def fail(*_: object) -> None:
    raise RuntimeError("no such kernel\nand a long story")


def test_what_stands_in_the_way_of_compiling_and_recording_is_told_and_done_without(
    lite0: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Kernels(compiled=True, captured=True)
    monkeypatch.setattr(kernels, "compiled", fail)
    monkeypatch.setattr(kernels, "Captured", lambda model, example: model)
    _, done, obstacle = quickened(lite0, PLAN, both)
    assert (done, obstacle) == (
        Kernels(compiled=False, captured=True),
        "the backbone cannot be compiled: no such kernel",
    )
    monkeypatch.setattr(kernels, "compiled", lambda *_: None)
    assert quickened(lite0, PLAN, both)[2] == "the compiled backbone gives other features"
    monkeypatch.setattr(kernels, "Captured", fail)
    _, done, obstacle = quickened(lite0, PLAN, replace(both, compiled=False))
    assert (done, obstacle) == (Kernels(), "the backbone cannot be recorded: no such kernel")


def test_on_a_cpu_nothing_is_compiled_or_recorded(config: DistillConfig) -> None:
    record = distill(config.model_copy(update={"steps": 1})).record
    assert record["kernels"] == {"compiled": False, "captured": False, "repeatable": True, "obstacle": None}


def test_a_run_that_was_recorded_is_not_resumed_where_it_cannot_be(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2})
    monkeypatch.setattr(run, "wanted_kernels", lambda *_: Kernels(captured=True))
    monkeypatch.setattr(kernels, "Captured", lambda model, example: model)
    with pytest.raises(PulledPlugError):
        distill(begun, pull_the_plug)
    monkeypatch.setattr(kernels, "Captured", fail)
    with pytest.raises(InputError, match="cannot be recorded: no such kernel, but in this run it was"):
        distill(begun.model_copy(update={"resume": True}))


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
