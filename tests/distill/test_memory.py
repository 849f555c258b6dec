import torch

from sfm.backbones.build import Backbone
from sfm.distill.memory import (
    GRAPH_BYTES,
    MOST_VIEWS,
    activation_bytes,
    free_bytes,
    graphs_for,
    micro_batch_for,
)


def test_activations_of_one_view_are_more_than_its_pixels(lite0: Backbone) -> None:
    assert activation_bytes(lite0) > 20 * 3 * 32 * 32 * 4


def test_a_micro_batch_fits_a_quarter_of_the_free_memory() -> None:
    assert micro_batch_for(images=1000, views=2, view_bytes=10, free=400) == 5


def test_a_micro_batch_has_at_least_one_image_and_no_more_than_there_are_or_are_of_use() -> None:
    assert micro_batch_for(images=1000, views=1, view_bytes=10**9, free=1) == 1
    assert micro_batch_for(images=10, views=1, view_bytes=1, free=10**12) == 10
    for kind, most in MOST_VIEWS.items():
        assert micro_batch_for(100 * most, views=1, view_bytes=1, free=10**12, kind=kind) == most


def test_a_micro_batch_of_several_views_has_fewer_images() -> None:
    most = MOST_VIEWS["cpu"]
    assert micro_batch_for(images=100 * most, views=3, view_bytes=1, free=10**12) <= most // 3
    assert micro_batch_for(images=100, views=2 * most, view_bytes=1, free=10**12) == 1


def test_all_micro_batches_are_about_as_large() -> None:
    one_too_many = 3 * MOST_VIEWS["cpu"] + 1
    assert micro_batch_for(images=one_too_many, views=1, view_bytes=1, free=10**12) == -(-one_too_many // 4)


def test_graphs_take_a_quarter_of_the_free_memory_and_no_more_however_many_images_there_are() -> None:
    assert graphs_for(images=1000, views=2, view_bytes=10, free=400) == 5
    assert graphs_for(images=1000, views=1, view_bytes=10**9, free=1) == 0
    assert graphs_for(images=7, views=1, view_bytes=1, free=10**12) == 7
    assert graphs_for(images=10**9, views=1, view_bytes=GRAPH_BYTES["cpu"] // 50, free=10**15) == 50


def test_a_gpu_keeps_the_graph_of_one_micro_batch() -> None:
    assert graphs_for(images=1000, views=1, view_bytes=1, free=10**12, kind="cuda") == 0


def test_some_memory_is_free_here() -> None:
    assert 10**8 < free_bytes(torch.device("cpu")) < 10**14
