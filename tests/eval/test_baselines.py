import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfm.eval.baselines import (
    choose_exemplars_nearest_to_distilled,
    count_min_exemplars_per_class,
    draw_random_exemplar_indices,
    select_exemplars_with_nearest_role,
)
from sfm.eval.class_subset import EMPTY_ROLE, NEAREST_ROLE, RANDOM_ROLE

ROLE = np.array([[1, 1, 0, 0, 0, 255], [1, 0, 1, 0, 0, 0]], dtype=np.uint8)


def test_nearest_exemplars_keep_their_stored_order() -> None:
    assert select_exemplars_with_nearest_role(ROLE, 2).tolist() == [[0, 1], [0, 2]]


def test_the_exemplar_count_is_the_minimum_over_classes() -> None:
    assert count_min_exemplars_per_class(ROLE, NEAREST_ROLE) == 2
    assert count_min_exemplars_per_class(ROLE, RANDOM_ROLE) == 3


@given(seed=st.integers(0, 1000), count=st.integers(1, 3), draws=st.integers(1, 5))
def test_a_draw_holds_distinct_random_exemplars(seed: int, count: int, draws: int) -> None:
    drawn = draw_random_exemplar_indices(ROLE, count, draws, seed)
    assert drawn.shape == (draws, 2, count)
    for draw in drawn:
        for c in range(2):
            assert (ROLE[c, draw[c]] == RANDOM_ROLE).all()
            assert len(set(draw[c].tolist())) == count


def test_draws_are_disjoint_while_there_are_enough_exemplars() -> None:
    drawn = draw_random_exemplar_indices(ROLE, 1, 3, run_seed=0)
    for c in range(2):
        assert len(set(drawn[:, c, 0].tolist())) == 3
    assert not np.array_equal(drawn, draw_random_exemplar_indices(ROLE, 1, 3, run_seed=1))


@given(seed=st.integers(0, 1000), count=st.integers(1, 3))
def test_neighbours_are_the_nearest_unused_exemplars(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    exemplars, distilled = (rng.normal(size=(2, n, 4)).astype(np.float32) for n in (6, count))
    chosen = choose_exemplars_nearest_to_distilled(ROLE != EMPTY_ROLE, exemplars, distilled)
    for c in range(2):
        left = set(np.flatnonzero(ROLE[c] != EMPTY_ROLE).tolist())
        for image in range(count):
            distance = {e: float(np.linalg.norm(exemplars[c, e] - distilled[c, image])) for e in left}
            assert chosen[c, image] == min(distance, key=lambda e: distance[e])
            left.remove(int(chosen[c, image]))
