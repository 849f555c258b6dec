import torch

from sfm.backbones.build import Backbone
from sfm.distill.activation_memory import (
    MAX_GRAPH_BYTES,
    MAX_VIEWS,
    choose_kept_graph_image_count,
    choose_micro_batch_size,
    measure_activation_bytes_per_view,
    measure_free_memory_bytes,
)


def test_measured_activation_bytes_exceed_the_input_size(lite0: Backbone) -> None:
    assert measure_activation_bytes_per_view(lite0) > 20 * 3 * 32 * 32 * 4


def test_micro_batch_size_fits_a_quarter_of_the_free_memory() -> None:
    assert (
        choose_micro_batch_size(image_count=1000, views_per_image=2, bytes_per_view=10, free_bytes=400) == 5
    )


def test_micro_batch_size_is_clamped_to_one_the_image_count_and_the_maximum() -> None:
    assert (
        choose_micro_batch_size(image_count=1000, views_per_image=1, bytes_per_view=10**9, free_bytes=1) == 1
    )
    assert (
        choose_micro_batch_size(image_count=10, views_per_image=1, bytes_per_view=1, free_bytes=10**12) == 10
    )
    for kind, most in MAX_VIEWS.items():
        assert (
            choose_micro_batch_size(
                100 * most, views_per_image=1, bytes_per_view=1, free_bytes=10**12, device_type=kind
            )
            == most
        )


def test_micro_batch_size_shrinks_with_the_views_per_image() -> None:
    most = MAX_VIEWS["cpu"]
    assert (
        choose_micro_batch_size(
            image_count=100 * most, views_per_image=3, bytes_per_view=1, free_bytes=10**12
        )
        <= most // 3
    )
    assert (
        choose_micro_batch_size(
            image_count=100, views_per_image=2 * most, bytes_per_view=1, free_bytes=10**12
        )
        == 1
    )


def test_micro_batches_have_nearly_equal_sizes() -> None:
    one_too_many = 3 * MAX_VIEWS["cpu"] + 1
    assert choose_micro_batch_size(
        image_count=one_too_many, views_per_image=1, bytes_per_view=1, free_bytes=10**12
    ) == -(-one_too_many // 4)


def test_kept_graphs_fit_a_quarter_of_the_free_memory_and_a_fixed_limit() -> None:
    assert (
        choose_kept_graph_image_count(image_count=1000, views_per_image=2, bytes_per_view=10, free_bytes=400)
        == 5
    )
    assert (
        choose_kept_graph_image_count(image_count=1000, views_per_image=1, bytes_per_view=10**9, free_bytes=1)
        == 0
    )
    assert (
        choose_kept_graph_image_count(image_count=7, views_per_image=1, bytes_per_view=1, free_bytes=10**12)
        == 7
    )
    assert (
        choose_kept_graph_image_count(
            image_count=10**9,
            views_per_image=1,
            bytes_per_view=MAX_GRAPH_BYTES["cpu"] // 50,
            free_bytes=10**15,
        )
        == 50
    )


def test_on_a_gpu_only_the_current_micro_batch_keeps_its_graph() -> None:
    assert (
        choose_kept_graph_image_count(
            image_count=1000, views_per_image=1, bytes_per_view=1, free_bytes=10**12, device_type="cuda"
        )
        == 0
    )


def test_free_cpu_memory_is_measured() -> None:
    assert 10**8 < measure_free_memory_bytes(torch.device("cpu")) < 10**14
