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
def cuda_graph_model(model: nn.Module) -> CudaGraphModel:
    return CudaGraphModel(model, make_images(4))


def make_images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, 3, 64, 64, device="cuda", generator=generator)


@pytest.mark.parametrize("count", [4, 3, 1, 6])
def test_cuda_graphs_match_features_and_gradient_at_any_batch_size(
    model: nn.Module, cuda_graph_model: CudaGraphModel, count: int
) -> None:
    found = []
    for one in (model, cuda_graph_model):
        images = make_images(count, count).requires_grad_()
        features = one(images)
        (gradient,) = torch.autograd.grad(features.square().sum(), images)
        found.append((features.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_cuda_graph_features_survive_the_next_forward_pass(
    model: nn.Module, cuda_graph_model: CudaGraphModel
) -> None:
    with torch.no_grad():
        first = cuda_graph_model(make_images(4, 1))
        cuda_graph_model(make_images(4, 2))
        torch.testing.assert_close(first, model(make_images(4, 1)), rtol=1e-4, atol=1e-5)


def test_backward_of_an_earlier_forward_pass_raises_an_error(cuda_graph_model: CudaGraphModel) -> None:
    images = make_images(4).requires_grad_()
    features = cuda_graph_model(images)
    with torch.no_grad():
        cuda_graph_model(make_images(4, 1))
    with pytest.raises(RuntimeError, match="another forward pass"):
        torch.autograd.grad(features.sum(), images)


def test_held_bytes_grow_with_the_batch_size(model: nn.Module) -> None:
    few, many = (CudaGraphModel(model, make_images(count)).held_bytes for count in (16, 128))
    # A block of 17 tokens of 192 values keeps some twelve times as many for the way back.
    assert many > 12 * 128 * 12 * 17 * 192 * 4 / 2
    assert few < many / 2
