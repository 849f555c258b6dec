import pytest
import torch

from sfm.backbones.execution.determinism import deterministic_algorithms, tf32_disabled

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_disabled_within_the_context_and_restored_after_it(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with tf32_disabled():
        with tf32_disabled():
            assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_deterministic_algorithms_are_not_enabled_on_a_cpu() -> None:
    with deterministic_algorithms(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("warn", [True, False])
def test_deterministic_algorithms_are_enabled_within_the_context_and_restored_after_it(warn: bool) -> None:
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
def test_a_convolution_without_tf32_is_close_to_float64() -> None:
    images, weight = torch.randn(4, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = torch.nn.functional.conv2d(images.double(), weight.double())
    with tf32_disabled():
        found = torch.nn.functional.conv2d(images, weight)
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
