import pytest
import torch

from sfm.backbones.execution.determinism import deterministic_algorithms, tf32_disabled

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("before", [True, False])
def test_float32_is_whole_for_a_while_and_then_as_it_was(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with tf32_disabled():
        with tf32_disabled():
            assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_cpu_needs_no_other_kernels_for_the_same_bits() -> None:
    with deterministic_algorithms(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("warn", [True, False])
def test_a_gpu_has_the_same_bits_for_a_while_and_then_as_it_was(warn: bool) -> None:
    torch.use_deterministic_algorithms(warn, warn_only=warn)
    try:
        with deterministic_algorithms(torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled() == warn
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_a_convolution_in_whole_float32_is_nearer_to_float64() -> None:
    images, weight = torch.randn(4, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = torch.nn.functional.conv2d(images.double(), weight.double())
    with tf32_disabled():
        found = torch.nn.functional.conv2d(images, weight)
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
