"""Convolutions whose backward computes only the input gradient: the same function and gradient, less kept."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution import optimize_backbone
from sfm.backbones.execution.conv_kernels import ClipBounds
from sfm.backbones.execution.input_grad_layers import BACKWARD_BYTES, InputGradConvChain, NaNPropagating
from sfm.backbones.execution.input_gradient import make_input_grad_model
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.distill.activation_memory import measure_activation_bytes_per_view
from sfm.distill.mixed_precision import convert_precision

CHANNELS_LAST = torch.channels_last
Chain = Sequence[tuple[nn.Conv2d, ClipBounds | None]]


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("lite0", image_size=32, device="cpu")


def seeded_randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def compute_output_and_gradient(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradient of a weighted sum of it."""
    images = images.detach().clone().requires_grad_()
    found = model(images)
    (gradient,) = torch.autograd.grad((found * seeded_randn(*found.shape, dtype=found.dtype)).sum(), images)
    return found.detach(), gradient


def assert_same(model: nn.Module, other: nn.Module, images: Tensor, tolerance: float) -> None:
    for one, two in zip(
        compute_output_and_gradient(model, images), compute_output_and_gradient(other, images), strict=True
    ):
        assert (one - two).abs().max() <= tolerance * one.abs().max()


def optimize_input_grad(backbone: Backbone) -> Backbone:
    changed, prepared = optimize_backbone(backbone, 1, "input-grad")
    assert prepared.mode == "input-grad"
    return changed


def make_changed_model(model: nn.Module, images: Tensor) -> nn.Module:
    changed = make_input_grad_model(model.eval().requires_grad_(False), images[:1]).model
    assert isinstance(changed, NaNPropagating)
    return changed


def test_the_input_gradient_of_a_backbone_matches_autograd_up_to_rounding(lite0: Backbone) -> None:
    size = lite0.card.preprocessing.input_size
    images = seeded_randn(3, 3, size, size).contiguous(memory_format=CHANNELS_LAST)
    assert_same(lite0.model, optimize_input_grad(lite0).model, images, 1e-4)
    double = replace(lite0, model=copy.deepcopy(lite0.model).double())
    again = make_changed_model(double.model, images.double())
    assert_same(double.model, again, images.double(), 1e-12)


def test_clipped_activations_are_kept_in_one_byte_per_value(lite0: Backbone) -> None:
    assert (
        measure_activation_bytes_per_view(optimize_input_grad(lite0))
        < measure_activation_bytes_per_view(lite0) / 6
    )


def test_weights_are_shared_and_the_original_model_is_unchanged(lite0: Backbone) -> None:
    before = list(lite0.model.modules())
    changed = optimize_input_grad(lite0).model
    assert list(lite0.model.modules()) == before
    own = {tensor.data_ptr(): name for name, tensor in lite0.model.named_parameters()}
    shared = {tensor.data_ptr() for tensor in changed.parameters()}
    assert shared <= own.keys()
    assert all("classifier" in own[place] for place in own.keys() - shared), "features need all others"
    assert all(not tensor.requires_grad for tensor in changed.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "mobilenetv2_035"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_model_families_keep_their_input_gradient(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).to(dtype)
    images = seeded_randn(3, 3, 64, 64, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
    changed = make_changed_model(model, images)
    assert_same(model, changed, images, 1e-3 if dtype == torch.float32 else 1e-10)


def test_a_model_with_one_convolution_is_returned_unchanged() -> None:
    model = timm.create_model("vit_tiny_patch16_224").eval().requires_grad_(False)
    assert make_input_grad_model(model, torch.zeros(1, 3, 224, 224)).model is model


CLIP_BOUNDS = st.sampled_from([None, (0.0, None), (0.0, 6.0), (-1.0, 1.0)])


@st.composite
def links(draw: st.DrawFn) -> tuple[nn.Conv2d, ClipBounds | None]:
    """A convolution of four channels, and what clips it."""
    kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    # torch itself (2.14, oneDNN 3.12) crashes now and then on a padded convolution of one pixel.
    padding = draw(st.integers(0, 2)) if kernel > 1 else 0
    dilation = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2, 4]))
    torch.manual_seed(0)
    if draw(st.booleans()):
        layer = Conv2dSame(4, 4, kernel, stride, dilation=dilation, groups=groups)
    else:
        layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups)
    return layer.requires_grad_(False).to(memory_format=CHANNELS_LAST), draw(CLIP_BOUNDS)


def compose_plain_layers(chain: Chain) -> Callable[[Tensor], Tensor]:
    def model(images: Tensor) -> Tensor:
        for layer, clip in chain:
            images = layer(images)
            if clip is not None:
                images = nn.functional.hardtanh(images, clip[0], clip[1] or 1e30)
        return images

    return model


@given(chain=st.lists(links(), min_size=1, max_size=3), height=st.integers(4, 12), width=st.integers(4, 12))
def test_the_backward_of_a_convolution_chain_matches_autograd(chain: Chain, height: int, width: int) -> None:
    images = (3 * seeded_randn(2, 4, height, width)).contiguous(memory_format=CHANNELS_LAST)
    try:
        expected = compute_output_and_gradient(compose_plain_layers(chain), images)
    except RuntimeError:
        reject()  # A kernel is larger than the map that is left.
    for one, two in zip(
        expected, compute_output_and_gradient(InputGradConvChain(chain), images), strict=True
    ):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(6, 3, 3), Conv2dSame(3, 8, 3, 2)])
@pytest.mark.parametrize("clip", [None, (0.0, 6.0)])
def test_the_backward_of_a_convolution_with_any_channel_count_matches_autograd(
    layer: nn.Conv2d, clip: ClipBounds | None
) -> None:
    images = (3 * seeded_randn(2, layer.in_channels, 11, 10)).contiguous(memory_format=CHANNELS_LAST)
    chain = [(layer.requires_grad_(False).to(memory_format=CHANNELS_LAST), clip)]
    expected = compute_output_and_gradient(compose_plain_layers(chain), images)
    for one, two in zip(
        expected, compute_output_and_gradient(InputGradConvChain(chain), images), strict=True
    ):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


def test_values_at_a_clip_bound_have_zero_gradient() -> None:
    same = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    same.weight.fill_(1)
    images = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 3.0, 5.9999995, 6.0, 7.0]).view(1, 1, 1, 8)
    for clip, expected in (((0.0, 6.0), [0, 0, 0, 1, 1, 1, 0, 0]), ((0.0, None), [0, 0, 0, 1, 1, 1, 1, 1])):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(InputGradConvChain([(same, clip)])(images).sum(), images)
        assert gradient.flatten().tolist() == expected


class BranchingModel(nn.Module):
    """Uses a clipped activation in two convolutions and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU6()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.act(self.first(images))
        return (self.second(hidden) * hidden + self.third(hidden) + hidden).flatten(1)


class InPlaceAddModel(nn.Module):
    """Adds to a clipped activation in its place, before the next convolution takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU6()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.act(self.first(images))
        hidden += self.second(images)
        return self.third(hidden).flatten(1)


class RepeatedConvModel(nn.Module):
    """Goes through its second convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.third(self.second(self.second(self.first(images)))).flatten(1)


def list_chain_lengths(model: nn.Module) -> list[int]:
    return [len(module.links) for module in model.modules() if isinstance(module, InputGradConvChain)]


def test_consecutive_convolutions_are_fused_into_chains(lite0: Backbone) -> None:
    lengths = list_chain_lengths(optimize_input_grad(lite0).model)
    assert sum(lengths) == sum(isinstance(module, nn.Conv2d) for module in lite0.model.modules())
    assert min(lengths) >= 3  # nothing but shortcuts ends a chain


@pytest.mark.parametrize("kind", [BranchingModel, InPlaceAddModel, RepeatedConvModel])
def test_a_convolution_whose_output_is_used_elsewhere_ends_a_chain(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, images = kind().double(), 9 * seeded_randn(2, 3, 8, 8, dtype=torch.float64)
    changed = make_changed_model(model, images)
    assert list_chain_lengths(changed) == [1, 1, 1]
    assert_same(model, changed, images, 1e-12)


class UnclippedOutputModel(nn.Module):
    """Takes what its convolution gives both clipped and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(self.first(images))
        return (self.act(hidden) - hidden).flatten(1)


class ShapeReadingModel(nn.Module):
    """Enlarges what its second convolution gives to the size that the first gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        return nn.functional.interpolate(self.second(hidden), hidden.shape[2:]).flatten(1)


class DetachedGateModel(nn.Module):
    """Weighs what its second convolution gives by what the first gave, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        return (self.second(hidden) * hidden.detach()[:, 3:]).flatten(1)


@pytest.mark.parametrize("kind", [ShapeReadingModel, DetachedGateModel])
def test_convolutions_whose_intermediate_output_is_used_are_not_fused(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, images = kind().double(), seeded_randn(2, 3, 8, 8, dtype=torch.float64)
    changed = make_changed_model(model, images)
    assert list_chain_lengths(changed) == [1, 1]
    assert_same(model, changed, images, 1e-12)


@pytest.mark.parametrize("name", ["edgenext_xx_small", "xcit_nano_12_p16_224"])
def test_a_model_that_reads_the_weights_of_its_convolutions_is_returned_unchanged(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval().requires_grad_(False)
    size = model.default_cfg["input_size"][1]
    found = make_input_grad_model(model, seeded_randn(1, 3, size, size))
    assert found.model is model
    assert found.unchanged_reason


def test_a_batch_larger_than_the_cache_has_the_gradients_of_single_images() -> None:
    torch.manual_seed(0)
    widths = (3, 8, 5)
    links = [nn.Conv2d(one, two, 3, padding=1).requires_grad_(False) for one, two in pairwise(widths)]
    chain = InputGradConvChain([(link, (0.0, 6.0)) for link in links])
    side = 80
    images = 9 * seeded_randn(3 * BACKWARD_BYTES // (8 * side**2 * 4), 3, side, side).contiguous(
        memory_format=CHANNELS_LAST
    )
    features, gradient = compute_output_and_gradient(lambda batch: chain(batch).mean((2, 3)), images)
    weights = seeded_randn(*features.shape)
    for index, image in enumerate(images):
        leaf = image[None].clone().requires_grad_()
        single = (chain(leaf).mean((2, 3)) * weights[index]).sum()
        torch.testing.assert_close(gradient[index], torch.autograd.grad(single, leaf)[0][0])


def test_grad_output_is_not_modified() -> None:
    chain = InputGradConvChain([(nn.Conv2d(3, 4, 1).requires_grad_(False), (0.0, 6.0))])
    leaf = seeded_randn(2, 3, 5, 5).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    found = chain(leaf)
    given = torch.ones_like(found)
    torch.autograd.grad(found, leaf, given)
    assert torch.equal(given, torch.ones_like(given))


class WeightPackingCounter(TorchDispatchMode):
    """Counts how often weights are packed for oneDNN."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reorder_convolution_weight" in str(func)
        return func(*args, **(kwargs or {}))


def test_inference_packs_no_weights_for_the_backward_pass(lite0: Backbone) -> None:
    quick, images = optimize_for_cpu_inference(lite0), torch.rand(2, 3, 32, 32)
    with WeightPackingCounter() as packed, torch.no_grad():
        torch.testing.assert_close(quick.features(images), lite0.features(images), rtol=1e-4, atol=1e-5)
        quick.features(images)
    assert packed.count == sum(isinstance(module, nn.Conv2d) for module in lite0.model.modules())


def test_a_model_whose_output_would_change_is_returned_unchanged() -> None:
    torch.manual_seed(0)
    model = UnclippedOutputModel().requires_grad_(False)
    assert make_input_grad_model(model, seeded_randn(1, 3, 8, 8)).model is model


def test_an_image_with_nan_has_nan_features(lite0: Backbone) -> None:
    size = lite0.card.preprocessing.input_size
    images = torch.rand(2, 3, size, size)
    images[1, 0, 3, 3] = torch.nan
    features = optimize_input_grad(lite0).features(images)
    assert features[0].isfinite().all()
    assert features[1].isnan().all()


def test_bf16_features_are_bit_for_bit_equal_and_gradients_agree(lite0: Backbone) -> None:
    mixed = convert_precision(lite0, "bf16")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    changed = optimize_input_grad(mixed)
    assert isinstance(changed.model, NaNPropagating)
    (features, gradient), (found, answered) = (
        compute_output_and_gradient(mixed.features, images),
        compute_output_and_gradient(changed.features, images),
    )
    assert torch.equal(found, features)
    assert torch.cosine_similarity(gradient.flatten(), answered.flatten(), dim=0) > 0.999
