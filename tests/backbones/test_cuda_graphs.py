"""Backbones recorded as CUDA graphs. All of it needs a GPU."""

import pytest
import timm
import torch
from torch import Tensor, nn

from sfm.backbones.execution.cuda_graphs import CudaGraphModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    return made.eval().requires_grad_(False).cuda()


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> CudaGraphModel:
    return CudaGraphModel(model, some(4))


def some(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, 3, 64, 64, device="cuda", generator=generator)


@pytest.mark.parametrize("count", [4, 3, 1, 6])
def test_batches_of_any_size_have_the_features_and_gradient_of_the_model(
    model: nn.Module, captured: CudaGraphModel, count: int
) -> None:
    found = []
    for one in (model, captured):
        images = some(count, count).requires_grad_()
        features = one(images)
        (gradient,) = torch.autograd.grad(features.square().sum(), images)
        found.append((features.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_features_outlive_the_next_forward_pass(model: nn.Module, captured: CudaGraphModel) -> None:
    with torch.no_grad():
        first = captured(some(4, 1))
        captured(some(4, 2))
        torch.testing.assert_close(first, model(some(4, 1)), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_forward_pass_before_the_last_is_refused(captured: CudaGraphModel) -> None:
    images = some(4).requires_grad_()
    features = captured(images)
    with torch.no_grad():
        captured(some(4, 1))
    with pytest.raises(RuntimeError, match="another forward pass"):
        torch.autograd.grad(features.sum(), images)


def test_it_says_what_memory_it_holds(model: nn.Module) -> None:
    few, many = (CudaGraphModel(model, some(count)).held_bytes for count in (16, 128))
    # A block of 17 tokens of 192 values keeps some twelve times as many for the way back.
    assert many > 12 * 128 * 12 * 17 * 192 * 4 / 2
    assert few < many / 2
