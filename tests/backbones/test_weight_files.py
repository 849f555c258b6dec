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


def build(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(MODEL, **options)


def digest(weights: Weights) -> str:
    return digest_weights(select_feature_tensors(weights, ["classifier"]))


@pytest.fixture(scope="module")
def plain() -> Weights:
    return dict(build(0).state_dict())


@pytest.fixture(scope="module")
def average() -> Weights:
    return dict(build(1).state_dict())


def load(path: Path) -> tuple[str, list[str]]:
    """Return the digest of the weights that are taken from a file, and what is said about the choice."""
    told: list[Progress] = []
    card = load_backbone(f"timm/{MODEL}@{path}", image_size=32, device="cpu", progress=told.append).card
    return card.weights, [event.stage for event in told]


def as_trained(folder: Path, *, ema: bool, wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> Path:
    """Write a checkpoint of a model that was fine-tuned for ten classes, as timm's training script does."""
    model, averaged = build(0, num_classes=10), build(1, num_classes=10)
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
def test_a_checkpoint_of_timms_training_is_loaded_as_timm_loads_it(
    ema: bool, wrap: Any, tmp_path: Path
) -> None:
    path = as_trained(tmp_path, ema=ema, wrap=wrap)
    theirs = build(2, num_classes=10)
    load_checkpoint(theirs, str(path))
    weights, said = load(path)
    assert weights == digest(theirs.state_dict())
    spec = f"weights of timm/{MODEL}@model_best.pth.tar"
    assert said == ([f"{spec} from state_dict_ema, not state_dict"] if ema else [])


def test_an_average_is_preferred_wherever_timm_looks_for_it(
    plain: Weights, average: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    for content, expected, choice in (
        ({"state_dict": plain, "state_dict_ema": average}, average, "state_dict_ema, not state_dict"),
        ({"model": plain, "model_ema": average}, average, "model_ema, not model"),
        ({"model": plain, "model_ema": None}, plain, None),
        ({"state_dict": plain, "model": average}, plain, "state_dict, not model"),
        ({"model": plain, "optimizer": {"state": {0: torch.ones(1)}}}, plain, None),
    ):
        torch.save(content, path)
        weights, said = load(path)
        assert weights == digest(expected)
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
def test_a_model_within_another_is_the_same_backbone(
    prefix: str, suffix: str, plain: Weights, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    # What else the outer model has is not the backbone's.
    outer = {"criterion.weight": torch.ones(2), "projector.0.weight": torch.ones(2, 2)}
    content = {f"{prefix}{name}": tensor.clone() for name, tensor in plain.items()}
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
    assert load(path) == (digest(plain), [])


def test_parts_that_were_compiled_or_sharded_alone_are_the_same(plain: Weights, tmp_path: Path) -> None:
    content = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in plain.items()}
    assert content.keys() != plain.keys()
    torch.save(content, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth")[0] == digest(plain)


def test_an_averaged_model_of_torch_is_the_same(plain: Weights, tmp_path: Path) -> None:
    model = build(3)
    model.load_state_dict(plain)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"model_ema": averaged.state_dict(), "args": Namespace()}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth")[0] == digest(plain)


@pytest.mark.parametrize(
    ("one", "two", "choice"),
    [
        ("backbone.", "momentum_backbone.", "backbone.*, not momentum_backbone.*"),
        ("", "ema.", "no prefix, not ema.*"),
        ("model.", "model.teacher.", "model.*, not model.teacher.*"),
    ],
)
def test_of_two_models_in_a_checkpoint_the_usual_one_is_taken_and_named(
    one: str, two: str, choice: str, plain: Weights, average: Weights, tmp_path: Path
) -> None:
    content = {f"{one}{n}": t for n, t in plain.items()} | {f"{two}{n}": t for n, t in average.items()}
    torch.save({"state_dict": content}, tmp_path / "w.ckpt")
    weights, said = load(tmp_path / "w.ckpt")
    assert weights == digest(plain)
    assert said == [f"weights of timm/{MODEL}@w.ckpt from {choice}"]


def test_of_two_models_in_a_checkpoint_none_is_guessed(
    plain: Weights, average: Weights, tmp_path: Path
) -> None:
    content = {f"student.{n}": t for n, t in plain.items()} | {f"teacher.{n}": t for n, t in average.items()}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"under student\.\* and teacher\.\*: save only the right ones"):
        load(tmp_path / "w.pth")


def test_weights_kept_elsewhere_are_named(plain: Weights, average: Weights, tmp_path: Path) -> None:
    torch.save({"student": dict(plain), "teacher": dict(average), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"no named tensors where timm looks, but under student, teacher: .*\['student'\]"
    ):
        load(tmp_path / "w.pth")


def test_the_same_tensor_with_and_without_a_wrapper_is_refused(plain: Weights, tmp_path: Path) -> None:
    torch.save({**plain, "module.conv_stem.weight": plain["conv_stem.weight"] + 1}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds conv_stem\.weight twice"):
        load(tmp_path / "w.pth")


def test_a_tensor_of_another_shape_in_an_inner_model_is_named_as_the_inner_model_names_it(
    plain: Weights, tmp_path: Path
) -> None:
    content = {f"backbone.{name}": tensor for name, tensor in plain.items()}
    content["backbone.conv_stem.weight"] = torch.ones(16, 1, 3, 3)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"does not fit test_efficientnet: conv_stem.weight is \(16, 1, 3, 3\), not"
    ):
        load(tmp_path / "w.pth")


class Settings:
    """What a training script may keep beside its weights."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(Path(__file__).with_name("executed")),))


def test_what_is_more_than_data_is_named_and_not_run(plain: Weights, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": dict(plain), "best": np.float64(71.5)}, path)
    with pytest.raises(
        InputError,
        match=r"not a checkpoint of plain tensors.*: numpy.*scalar.* save only its weights: torch.save",
    ):
        load(path)
    torch.save({"state_dict": dict(plain), "args": Namespace(settings=Settings())}, path)
    with pytest.raises(InputError, match=r"posix\.mkdir") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not Path(__file__).with_name("executed").exists()
