import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfm.eval.training import RandomStreamPurpose, draw_initial_weights_by_seed, make_batch_schedule


def make_image_indices(seeds: int, images: int) -> np.ndarray:
    return np.tile(np.arange(images), (seeds, 1))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**40),
    images=st.integers(1, 130),
    epochs=st.integers(1, 12),
    views=st.integers(1, 15),
)
def test_each_epoch_uses_every_image_once_and_views_are_used_evenly(
    seed: int, images: int, epochs: int, views: int
) -> None:
    schedule = make_batch_schedule(
        seed, make_image_indices(2, images), epoch_count=epochs, views_per_image=views
    )
    assert (schedule.image_indices.sort(-1).values == torch.arange(images)).all()
    used = torch.zeros(2, images, views, dtype=torch.int64)
    for epoch in range(epochs):
        for s in range(2):
            used[s, schedule.image_indices[s, epoch].long(), schedule.view_indices[s, epoch].long()] += 1
    assert int(used.max() - used.min()) <= 1


def test_images_are_shuffled_only_if_they_exceed_one_batch() -> None:
    few = make_batch_schedule(0, make_image_indices(2, 100), epoch_count=3, views_per_image=2)
    many = make_batch_schedule(0, make_image_indices(2, 101), epoch_count=3, views_per_image=2)
    assert few.batch_size == many.batch_size == 100
    assert (few.image_indices == torch.arange(100)).all()
    assert not torch.equal(many.image_indices[0, 0], many.image_indices[0, 1])
    assert not torch.equal(many.image_indices[0, 0], many.image_indices[1, 0])


def test_each_seed_trains_on_its_own_images() -> None:
    schedule = make_batch_schedule(0, np.array([[0, 1], [2, 3]]), epoch_count=4, views_per_image=3)
    assert schedule.image_indices.tolist() == [[[0, 1]] * 4, [[2, 3]] * 4]


def test_batches_and_initial_weights_of_a_seed_are_independent_of_the_seed_count() -> None:
    one, three = (
        make_batch_schedule(5, make_image_indices(n, 110), epoch_count=4, views_per_image=3) for n in (1, 3)
    )
    assert torch.equal(one.image_indices[0], three.image_indices[0])
    assert torch.equal(one.view_indices[0], three.view_indices[0])
    few, more = (draw_initial_weights_by_seed(5, RandomStreamPurpose.HEAD, (n, 4, 6), 0.01) for n in (1, 3))
    assert torch.equal(few[0], more[0])
    assert not torch.equal(more[0], more[1])


def test_equal_seeds_give_equal_schedules_and_other_seeds_do_not() -> None:
    first, again, other = (
        make_batch_schedule(seed, make_image_indices(1, 10), epoch_count=20, views_per_image=9)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.view_indices, again.view_indices)
    assert not torch.equal(first.view_indices, other.view_indices)
