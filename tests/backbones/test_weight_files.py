"""Checkpoints as training leaves them: loaded as timm loads them, or refused with what to do."""

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from sfm.backbones.build import load_backbone
from sfm.backbones.identity import digest_weights, select_feature_tensors
from sfm.errors import InputError
from sfm.events import Progress

MODEL = "test_efficientnet"
Weights = Mapping[str, Tensor]


def make_model(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(MODEL, **options)


def compute_digest(weights: Weights) -> str:
    return digest_weights(select_feature_tensors(weights, ["classifier"]))


@pytest.fixture(scope="module")
def model_weights() -> Weights:
    return dict(make_model(0).state_dict())


@pytest.fixture(scope="module")
def ema_weights() -> Weights:
    return dict(make_model(1).state_dict())


def load_digest_and_notes(path: Path) -> tuple[str, list[str]]:
    """Return the digest of the weights that are taken from a file, and what is said about the choice."""
    told: list[Progress] = []
    card = load_backbone(f"timm/{MODEL}@{path}", image_size=32, device="cpu", progress=told.append).card
    return card.weights, [event.stage for event in told]


def write_training_checkpoint(
    folder: Path, *, ema: bool, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
) -> Path:
    """Write a checkpoint of a model that was fine-tuned for ten classes, as timm's training script does."""
    model, averaged = make_model(0, num_classes=10), make_model(1, num_classes=10)
    arguments = Namespace(model=MODEL, opt="sgd", lr=0.1, mean=None, crop_pct=0.95, aa="rand-m9", bce=False)
    saver = CheckpointSaver(
        wrap(model),
        torch.optim.SGD(model.parameters(), momentum=0.9),
        args=arguments,
        model_ema=ModelEmaV3(averaged) if ema else None,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(epoch=3, metric=71.5)
    return folder / "model_best.pth.tar"


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "parallel"])
def test_a_timm_training_checkpoint_is_loaded_as_timm_loads_it(ema: bool, wrap: Any, tmp_path: Path) -> None:
    path = write_training_checkpoint(tmp_path, ema=ema, wrap=wrap)
    theirs = make_model(2, num_classes=10)
    load_checkpoint(theirs, str(path))
    weights, said = load_digest_and_notes(path)
    assert weights == compute_digest(theirs.state_dict())
    spec = f"weights of timm/{MODEL}@model_best.pth.tar"
    assert said == ([f"{spec} from state_dict_ema, not state_dict"] if ema else [])


def test_ema_weights_are_preferred_wherever_timm_looks_for_them(
    model_weights: Weights, ema_weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    for content, expected, choice in (
        (
            {"state_dict": model_weights, "state_dict_ema": ema_weights},
            ema_weights,
            "state_dict_ema, not state_dict",
        ),
        ({"model": model_weights, "model_ema": ema_weights}, ema_weights, "model_ema, not model"),
        ({"model": model_weights, "model_ema": None}, model_weights, None),
        ({"state_dict": model_weights, "model": ema_weights}, model_weights, "state_dict, not model"),
        ({"model": model_weights, "optimizer": {"state": {0: torch.ones(1)}}}, model_weights, None),
    ):
        torch.save(content, path)
        weights, said = load_digest_and_notes(path)
        assert weights == compute_digest(expected)
        assert [line.partition(" from ")[2] for line in said] == ([] if choice is None else [choice])


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "backbone.",
        "encoder.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "module.model.",
        "model._orig_mod.",
        "model.backbone.",
        "module.module.",
        "_fsdp_wrapped_module.",
        "timm_model.",
        "student.net.",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_wrapped_model_has_the_same_weights_digest(
    prefix: str, suffix: str, model_weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    # What else the outer model has is not the backbone's.
    outer = {"criterion.weight": torch.ones(2), "projector.0.weight": torch.ones(2, 2)}
    content = {f"{prefix}{name}": tensor.clone() for name, tensor in model_weights.items()}
    if prefix not in (
        "module.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "_fsdp_wrapped_module.",
    ):
        content |= outer
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save({"state_dict": content, "args": Namespace(lr=1.0)}, path)
    assert load_digest_and_notes(path) == (compute_digest(model_weights), [])


def test_partially_compiled_or_sharded_modules_have_the_same_weights_digest(
    model_weights: Weights, tmp_path: Path
) -> None:
    content = {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in model_weights.items()
    }
    assert content.keys() != model_weights.keys()
    torch.save(content, tmp_path / "w.pth")
    assert load_digest_and_notes(tmp_path / "w.pth")[0] == compute_digest(model_weights)


def test_a_torch_averaged_model_has_the_same_weights_digest(model_weights: Weights, tmp_path: Path) -> None:
    model = make_model(3)
    model.load_state_dict(model_weights)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"model_ema": averaged.state_dict(), "args": Namespace()}, tmp_path / "w.pth")
    assert load_digest_and_notes(tmp_path / "w.pth")[0] == compute_digest(model_weights)


@pytest.mark.parametrize(
    ("one", "two", "choice"),
    [
        ("backbone.", "momentum_backbone.", "backbone.*, not momentum_backbone.*"),
        ("", "ema.", "no prefix, not ema.*"),
        ("model.", "model.teacher.", "model.*, not model.teacher.*"),
    ],
)
def test_the_usual_one_of_two_models_in_a_checkpoint_is_chosen_and_reported(
    one: str, two: str, choice: str, model_weights: Weights, ema_weights: Weights, tmp_path: Path
) -> None:
    content = {f"{one}{n}": t for n, t in model_weights.items()} | {
        f"{two}{n}": t for n, t in ema_weights.items()
    }
    torch.save({"state_dict": content}, tmp_path / "w.ckpt")
    weights, said = load_digest_and_notes(tmp_path / "w.ckpt")
    assert weights == compute_digest(model_weights)
    assert said == [f"weights of timm/{MODEL}@w.ckpt from {choice}"]


def test_two_ambiguous_models_in_a_checkpoint_are_refused(
    model_weights: Weights, ema_weights: Weights, tmp_path: Path
) -> None:
    content = {f"student.{n}": t for n, t in model_weights.items()} | {
        f"teacher.{n}": t for n, t in ema_weights.items()
    }
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"under student\.\* and teacher\.\*: save only the right ones"):
        load_digest_and_notes(tmp_path / "w.pth")


def test_weights_under_unknown_keys_are_named_in_the_error(
    model_weights: Weights, ema_weights: Weights, tmp_path: Path
) -> None:
    torch.save({"student": dict(model_weights), "teacher": dict(ema_weights), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"no named tensors where timm looks, but under student, teacher: .*\['student'\]"
    ):
        load_digest_and_notes(tmp_path / "w.pth")


def test_a_tensor_with_and_without_a_wrapper_prefix_is_refused(
    model_weights: Weights, tmp_path: Path
) -> None:
    torch.save(
        {**model_weights, "module.conv_stem.weight": model_weights["conv_stem.weight"] + 1},
        tmp_path / "w.pth",
    )
    with pytest.raises(InputError, match=r"holds conv_stem\.weight twice"):
        load_digest_and_notes(tmp_path / "w.pth")


def test_a_shape_mismatch_error_uses_the_tensor_name_of_the_inner_model(
    model_weights: Weights, tmp_path: Path
) -> None:
    content = {f"backbone.{name}": tensor for name, tensor in model_weights.items()}
    content["backbone.conv_stem.weight"] = torch.ones(16, 1, 3, 3)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"does not fit test_efficientnet: conv_stem.weight is \(16, 1, 3, 3\), not"
    ):
        load_digest_and_notes(tmp_path / "w.pth")


class Settings:
    """What a training script may keep beside its weights."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(Path(__file__).with_name("executed")),))


def test_code_in_a_checkpoint_is_named_in_the_error_and_not_executed(
    model_weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": dict(model_weights), "best": np.float64(71.5)}, path)
    with pytest.raises(
        InputError,
        match=r"not a checkpoint of plain tensors.*: numpy.*scalar.* save only its weights: torch.save",
    ):
        load_digest_and_notes(path)
    torch.save({"state_dict": dict(model_weights), "args": Namespace(settings=Settings())}, path)
    with pytest.raises(InputError, match=r"posix\.mkdir") as caught:
        load_digest_and_notes(path)
    assert "\n" not in str(caught.value)
    assert not Path(__file__).with_name("executed").exists()
