import shutil

import pytest
import timm
import torch
from torch import nn

from sfm.backbones.execution.agreement import outputs_and_gradients_agree
from sfm.backbones.execution.compilation import (
    can_compile_for,
    compile_model_if_equivalent,
    find_dominant_repeated_blocks,
)


def make_model(name: str, **options: int) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(name, num_classes=0, **options)
    return made.eval().requires_grad_(False)


def test_repeated_blocks_are_found_in_a_transformer_but_not_in_a_convnet() -> None:
    transformer = make_model("vit_tiny_patch16_224")
    assert find_dominant_repeated_blocks(transformer) == list(transformer.blocks)  # type: ignore[arg-type]
    assert find_dominant_repeated_blocks(make_model("efficientnet_lite0")) == []
    assert find_dominant_repeated_blocks(make_model("resnet18")) == []


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_compiled_model_shares_weights_and_matches_features_and_gradient() -> None:
    model = make_model("vit_tiny_patch16_224", img_size=32, depth=2)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quick = compile_model_if_equivalent(model, images)
    assert quick is not None
    own = {tensor.data_ptr() for tensor in model.parameters()}
    assert {tensor.data_ptr() for tensor in quick.parameters()} == own
    assert outputs_and_gradients_agree(model, quick, images + 1)


def test_models_with_different_weights_do_not_agree() -> None:
    model, other = make_model("vit_tiny_patch16_224", img_size=32, depth=2), make_model("resnet18")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = make_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert outputs_and_gradients_agree(model, moved, images)
    with torch.no_grad():
        moved.get_parameter("blocks.0.attn.qkv.weight").mul_(1.5)
    assert not outputs_and_gradients_agree(model, moved, images)
    assert not outputs_and_gradients_agree(other, other, images * torch.nan)


def test_cpus_do_not_compile_by_default() -> None:
    assert not can_compile_for(torch.device("cpu"))
