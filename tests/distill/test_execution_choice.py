import json
from pathlib import Path

import pytest
import torch
from resolved_run import make_resolved_config
from safetensors.torch import load_file

from sfm.backbones.build import Backbone
from sfm.backbones.execution import optimize_backbone, preparation
from sfm.distill import config_resolution, execution_choice
from sfm.distill.config import DistillConfig
from sfm.distill.execution_choice import MIN_VIEWS_TO_COMPILE, choose_execution, should_compile
from sfm.distill.process_group import ProcessGroup
from sfm.distill.resolved_config import ExecutionChoice
from sfm.distill.run import distill
from sfm.errors import InputError
from sfm.events import Progress

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = make_resolved_config(classes=4, steps=10, micro_batch=2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_long_run_is_worth_compiling_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not should_compile("auto", MIN_VIEWS_TO_COMPILE, CPU)
    monkeypatch.setattr(execution_choice, "can_compile_for", lambda device: device.type == "cuda")
    assert should_compile("auto", MIN_VIEWS_TO_COMPILE, GPU)
    assert not should_compile("auto", MIN_VIEWS_TO_COMPILE - 1, GPU)
    assert not should_compile("auto", MIN_VIEWS_TO_COMPILE, GPU, ProcessGroup(0, 2))
    assert not should_compile("no", MIN_VIEWS_TO_COMPILE, GPU)
    assert should_compile("yes", 1, GPU)


def test_what_cannot_be_compiled_is_refused_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="one process on a GPU"):
        should_compile("yes", 1, CPU)
    with pytest.raises(InputError, match="one process on a GPU"):
        should_compile("yes", 1, GPU, ProcessGroup(0, 2))
    monkeypatch.setattr(execution_choice, "can_compile_for", lambda device: False)
    with pytest.raises(InputError, match="Triton"):
        should_compile("yes", 1, GPU)
    monkeypatch.setattr(execution_choice, "can_compile_for", lambda device: True)
    with pytest.raises(InputError, match="--graphs"):
        choose_execution(CONFIG.model_copy(update={"graphs": 4}), "auto", "yes", GPU)
    with pytest.raises(InputError, match="--execution eager compiles nothing"):
        choose_execution(CONFIG, "eager", "yes", GPU)


def test_a_gpu_records_a_run_of_one_process_that_keeps_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_choice, "can_compile_for", lambda device: True)
    assert choose_execution(CONFIG, "auto", "auto", GPU).mode == "cuda-graph"
    long = CONFIG.model_copy(update={"steps": MIN_VIEWS_TO_COMPILE})
    assert choose_execution(long, "auto", "auto", GPU).mode == "compiled"
    assert choose_execution(long.model_copy(update={"graphs": 4}), "auto", "auto", GPU).mode == "input-grad"
    assert choose_execution(long, "auto", "auto", CPU).mode == "input-grad"
    assert choose_execution(long, "auto", "auto", GPU, ProcessGroup(0, 2)).mode == "input-grad"
    assert choose_execution(long, "eager", "auto", GPU).mode == "eager"


def fail(*_: object) -> None:
    raise RuntimeError("no such kernel\nand a long story")


def test_a_mode_that_fails_falls_back_to_the_next_one_and_says_why(
    lite0: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparation, "compile_model_if_equivalent", fail)
    monkeypatch.setattr(preparation, "CudaGraphModel", lambda model, example: model)
    prepared = optimize_backbone(lite0, 2, "compiled")[1]
    assert prepared.mode == "cuda-graph"
    assert prepared.reason == "the backbone cannot be compiled: no such kernel"
    monkeypatch.setattr(preparation, "compile_model_if_equivalent", lambda *_: None)
    assert (
        optimize_backbone(lite0, 2, "compiled")[1].reason == "the compiled backbone computes other features"
    )
    monkeypatch.setattr(preparation, "CudaGraphModel", fail)
    prepared = optimize_backbone(lite0, 2, "cuda-graph")[1]
    assert prepared.mode == "input-grad"
    assert prepared.reason == "the backbone cannot be recorded: no such kernel"
    monkeypatch.setattr("sfm.backbones.execution.input_gradient.replace_convolutions", fail)
    changed, prepared = optimize_backbone(lite0, 2, "input-grad")
    assert changed.model is lite0.model
    assert prepared.mode == "eager"
    assert "cannot be replaced: RuntimeError: no such kernel" in str(prepared.reason)
    assert "runs in mode eager, not input-grad: convolutions cannot be replaced" in caplog.text


def test_a_run_on_a_cpu_computes_input_gradients_only_and_records_it(config: DistillConfig) -> None:
    record = distill(config.model_copy(update={"steps": 1})).record
    assert record["execution"] == {"mode": "input-grad", "reason": "on a CPU"}
    assert record["kernels"] == {"compiled": False, "captured": False, "repeatable": True, "obstacle": None}


def test_an_eager_run_gives_the_same_images_up_to_rounding(config: DistillConfig, tmp_path: Path) -> None:
    def levels_after_one_step(execution: str) -> dict[str, torch.Tensor]:
        out = tmp_path / execution
        record = distill(config.model_copy(update={"steps": 1, "execution": execution, "out": out})).record
        assert record["execution"]["mode"] == ("eager" if execution == "eager" else "input-grad")
        return load_file(next(out.glob("checkpoint/step_*/state.safetensors")))

    eager, fast = levels_after_one_step("eager"), levels_after_one_step("auto")
    assert eager.keys() == fast.keys()
    for name, tensor in eager.items():
        if name.endswith("/adam/first"):
            assert torch.cosine_similarity(tensor.flatten(), fast[name].flatten(), dim=0) > 0.99, name


def test_an_eager_run_runs_the_model_as_pytorch_does(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "make_input_grad_model", fail)
    monkeypatch.setattr(preparation, "compile_model_if_equivalent", fail)
    monkeypatch.setattr("sfm.backbones.build.fold_batch_norms_if_equivalent", fail)
    assert distill(config.model_copy(update={"steps": 1, "execution": "eager"})).record["loss"]


def test_a_resumed_run_keeps_its_execution_mode(config: DistillConfig, tmp_path: Path) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2, "execution": "eager"})
    whole = distill(begun.model_copy(update={"out": tmp_path / "whole"})).record
    with pytest.raises(PulledPlugError):
        distill(begun, pull_the_plug)
    resumed = distill(begun.model_copy(update={"resume": True})).record
    assert resumed["execution"] == whole["execution"] == {"mode": "eager", "reason": "asked for"}
    assert resumed["images"] == whole["images"]


def test_a_run_that_was_not_eager_is_not_resumed_eagerly(config: DistillConfig) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2})
    with pytest.raises(PulledPlugError):
        distill(begun, pull_the_plug)
    with pytest.raises(InputError, match=r"--execution was auto \(mode input-grad\) and is eager now"):
        distill(begun.model_copy(update={"resume": True, "execution": "eager"}))


def test_a_run_that_was_recorded_is_not_resumed_where_it_cannot_be(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2})
    monkeypatch.setattr(
        config_resolution,
        "choose_execution",
        lambda *_: ExecutionChoice(mode="cuda-graph", reason="on a GPU"),
    )
    monkeypatch.setattr(preparation, "CudaGraphModel", lambda model, example: model)
    with pytest.raises(PulledPlugError):
        distill(begun, pull_the_plug)
    monkeypatch.setattr(preparation, "CudaGraphModel", fail)
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
