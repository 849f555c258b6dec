"""Execution modes: what is taken, why, and that an unoptimised backbone is the same one."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution import make_example_images, optimize_backbone, prepare
from sfm.backbones.execution.preparation import optimize_for_cpu_inference


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=32, device="cpu")


def test_eager_mode_returns_the_model_itself(lite0: Backbone) -> None:
    prepared = prepare(lite0, make_example_images(lite0, 2), "eager")
    assert prepared.model is lite0.model
    assert (prepared.mode, prepared.reason) == ("eager", None)
    assert optimize_for_cpu_inference(lite0, "eager") is lite0


def test_batch_norm_folding_keeps_the_card_and_the_features(lite0: Backbone) -> None:
    plain = load_backbone("lite0", image_size=32, device="cpu", fold_norms=False)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.model.modules())
    assert plain.card == lite0.card
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain.features(images), lite0.features(images), rtol=1e-3, atol=1e-4)


def test_input_grad_falls_back_to_eager_for_a_transformer_and_gives_the_reason(tmp_path: Path) -> None:
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    spec = f"timm/vit_tiny_patch16_224@{tmp_path / 'vit.safetensors'}"
    backbone = load_backbone(spec, image_size=32, device="cpu")
    changed, prepared = optimize_backbone(backbone, 1, "input-grad")
    assert changed.model is backbone.model
    assert prepared.mode == "eager"
    assert prepared.reason == "the model has no convolutions that would gain"
