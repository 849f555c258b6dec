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


def test_auto_compiles_long_runs_of_one_process_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not should_compile("auto", MIN_VIEWS_TO_COMPILE, CPU)
    monkeypatch.setattr(execution_choice, "can_compile_for", lambda device: device.type == "cuda")
    assert should_compile("auto", MIN_VIEWS_TO_COMPILE, GPU)
    assert not should_compile("auto", MIN_VIEWS_TO_COMPILE - 1, GPU)
    assert not should_compile("auto", MIN_VIEWS_TO_COMPILE, GPU, ProcessGroup(0, 2))
    assert not should_compile("no", MIN_VIEWS_TO_COMPILE, GPU)
    assert should_compile("yes", 1, GPU)


def test_compile_yes_is_refused_where_compilation_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cuda_graphs_are_chosen_for_one_process_that_keeps_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_choice, "can_compile_for", lambda device: True)
    assert choose_execution(CONFIG, "auto", "auto", GPU).mode == "cuda-graph"
    long = CONFIG.model_copy(update={"steps": MIN_VIEWS_TO_COMPILE})
    assert choose_execution(long, "auto", "auto", GPU).mode == "compiled"
    assert choose_execution(long.model_copy(update={"graphs": 4}), "auto", "auto", GPU).mode == "input-grad"
    assert choose_execution(long, "auto", "auto", CPU).mode == "input-grad"
    assert choose_execution(long, "auto", "auto", GPU, ProcessGroup(0, 2)).mode == "input-grad"
    assert choose_execution(long, "eager", "auto", GPU).mode == "eager"


def raise_no_such_kernel(*_: object) -> None:
    raise RuntimeError("no such kernel\nand a long story")


def test_a_failing_mode_falls_back_to_the_next_and_logs_the_reason(
    lite0: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparation, "compile_model_if_equivalent", raise_no_such_kernel)
    monkeypatch.setattr(preparation, "CudaGraphModel", lambda model, example: model)
    prepared = optimize_backbone(lite0, 2, "compiled")[1]
    assert prepared.mode == "cuda-graph"
    assert prepared.reason == "the backbone cannot be compiled: no such kernel"
    monkeypatch.setattr(preparation, "compile_model_if_equivalent", lambda *_: None)
    assert (
        optimize_backbone(lite0, 2, "compiled")[1].reason == "the compiled backbone computes other features"
    )
    monkeypatch.setattr(preparation, "CudaGraphModel", raise_no_such_kernel)
    prepared = optimize_backbone(lite0, 2, "cuda-graph")[1]
    assert prepared.mode == "input-grad"
    assert prepared.reason == "the backbone cannot be recorded: no such kernel"
    monkeypatch.setattr("sfm.backbones.execution.input_gradient.replace_convolutions", raise_no_such_kernel)
    changed, prepared = optimize_backbone(lite0, 2, "input-grad")
    assert changed.model is lite0.model
    assert prepared.mode == "eager"
    assert "cannot be replaced: RuntimeError: no such kernel" in str(prepared.reason)
    assert "runs in mode eager, not input-grad: convolutions cannot be replaced" in caplog.text


def test_a_cpu_run_uses_input_grad_mode_and_records_it(config: DistillConfig) -> None:
    record = distill(config.model_copy(update={"steps": 1})).record
    assert record["execution"] == {"mode": "input-grad", "reason": "on a CPU"}
    assert record["kernels"] == {"compiled": False, "captured": False, "repeatable": True, "obstacle": None}


def test_eager_and_input_grad_gradients_agree_up_to_rounding(config: DistillConfig, tmp_path: Path) -> None:
    def compute_state_after_one_step(execution: str) -> dict[str, torch.Tensor]:
        out = tmp_path / execution
        record = distill(config.model_copy(update={"steps": 1, "execution": execution, "out": out})).record
        assert record["execution"]["mode"] == ("eager" if execution == "eager" else "input-grad")
        return load_file(next(out.glob("checkpoint/step_*/state.safetensors")))

    eager, fast = compute_state_after_one_step("eager"), compute_state_after_one_step("auto")
    assert eager.keys() == fast.keys()
    for name, tensor in eager.items():
        if name.endswith("/adam/first"):
            assert torch.cosine_similarity(tensor.flatten(), fast[name].flatten(), dim=0) > 0.99, name


def test_an_eager_run_applies_no_optimisation(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "make_input_grad_model", raise_no_such_kernel)
    monkeypatch.setattr(preparation, "compile_model_if_equivalent", raise_no_such_kernel)
    monkeypatch.setattr("sfm.backbones.build.fold_batch_norms_if_equivalent", raise_no_such_kernel)
    assert distill(config.model_copy(update={"steps": 1, "execution": "eager"})).record["loss"]


def test_a_resumed_run_keeps_its_execution_mode(config: DistillConfig, tmp_path: Path) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2, "execution": "eager"})
    whole = distill(begun.model_copy(update={"out": tmp_path / "whole"})).record
    with pytest.raises(SimulatedCrashError):
        distill(begun, crash_at_step_5)
    resumed = distill(begun.model_copy(update={"resume": True})).record
    assert resumed["execution"] == whole["execution"] == {"mode": "eager", "reason": "asked for"}
    assert resumed["images"] == whole["images"]


def test_resuming_an_optimised_run_in_eager_mode_is_refused(config: DistillConfig) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2})
    with pytest.raises(SimulatedCrashError):
        distill(begun, crash_at_step_5)
    with pytest.raises(InputError, match=r"--execution was auto \(mode input-grad\) and is eager now"):
        distill(begun.model_copy(update={"resume": True, "execution": "eager"}))


def test_resuming_a_cuda_graph_run_is_refused_where_capture_fails(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = config.model_copy(update={"steps": 12, "checkpoint_every": 2})
    monkeypatch.setattr(
        config_resolution,
        "choose_execution",
        lambda *_: ExecutionChoice(mode="cuda-graph", reason="on a GPU"),
    )
    monkeypatch.setattr(preparation, "CudaGraphModel", lambda model, example: model)
    with pytest.raises(SimulatedCrashError):
        distill(begun, crash_at_step_5)
    monkeypatch.setattr(preparation, "CudaGraphModel", raise_no_such_kernel)
    with pytest.raises(InputError, match="cannot be recorded: no such kernel, but in this run it was"):
        distill(begun.model_copy(update={"resume": True}))


class SimulatedCrashError(Exception):
    pass


def crash_at_step_5(event: Progress) -> None:
    if event.stage == "distil" and event.done == 5:
        raise SimulatedCrashError


@needs_gpu
@pytest.mark.parametrize(
    "options", [{}, {"compile": "yes"}, {"precision": "bf16"}, {"graphs": 4}, {"gradient": "one-pass"}]
)
def test_a_resumed_gpu_run_is_bit_for_bit_reproducible(
    config: DistillConfig, tmp_path: Path, options: dict[str, object]
) -> None:
    def make_gpu_config(name: str, **more: object) -> DistillConfig:
        cut = {"device": "cuda", "micro_batch": 3, "steps": 12, "checkpoint_every": 4}
        return config.model_copy(update=cut | options | {"out": tmp_path / name} | more)

    undisturbed = distill(make_gpu_config("undisturbed")).record
    assert undisturbed["kernels"]["repeatable"]
    assert undisturbed["kernels"]["captured"] == ("graphs" not in options)
    assert undisturbed["kernels"]["compiled"] == ("compile" in options)
    with pytest.raises(SimulatedCrashError):
        distill(make_gpu_config("cut"), crash_at_step_5)
    resumed = distill(make_gpu_config("cut", resume=True)).record
    assert resumed["images"] == undisturbed["images"]
    both = [(tmp_path / name / "run.json").read_text() for name in ("undisturbed", "cut")]
    assert json.loads(both[0])["loss"] == json.loads(both[1])["loss"]
