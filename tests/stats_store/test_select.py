"""A name, a backbone and a size mean one entry, or an error that lists what they could mean."""

from pathlib import Path

import pytest
from toy_entries import make_backbone_card, publish_random_draft, write_random_arrays

from sfm.backbones.card import BackboneCard
from sfm.errors import InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_history import find_entry_history, list_visible_and_pinned_summaries
from sfm.stats_store.entry_selection import (
    describe_entry,
    filter_summaries_by_model,
    find_named_summaries,
    find_summaries,
    open_entry_of_backbone,
    select_only_summary,
)
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store


def add(store: Store, seed: int, backbone: BackboneCard, **more: object) -> Summary:
    draft = Draft(store)
    write_random_arrays(draft, seed)
    return publish_random_draft(draft, backbone=backbone, **more).summary  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Birds through lite0 at two sizes and lite1 at one, with a tuning entry; cars through lite0."""
    store = open_or_create_store(str(tmp_path_factory.mktemp("store")))
    add(store, 1, make_backbone_card("lite0", 96), dataset="birds")
    add(store, 2, make_backbone_card("lite0", 64), dataset="birds")
    add(store, 3, make_backbone_card("lite1", 96), dataset="birds")
    add(store, 4, make_backbone_card("lite1", 96), dataset="birds", role="tuning", fingerprint="e" * 64)
    add(store, 5, make_backbone_card("lite0", 96), dataset="cars", fingerprint="d" * 64)
    return store


def test_an_unknown_name_is_answered_with_close_ones(store: Store) -> None:
    with pytest.raises(InputError, match="no dataset 'bird' in the store: did you mean birds"):
        find_named_summaries(store.list_summaries(), "bird")


def test_a_name_that_is_like_no_other_is_answered_with_what_there_is(store: Store) -> None:
    with pytest.raises(InputError, match="no dataset 'xyz' in the store: the store holds birds@") as error:
        find_named_summaries(store.list_summaries(), "xyz")
    assert all(describe_entry(s) in str(error.value) for s in store.list_summaries())


def test_a_name_in_an_empty_store_is_answered_plainly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the store holds nothing"):
        find_named_summaries(open_or_create_store(str(tmp_path)).list_summaries(), "birds")


def test_a_long_list_of_candidates_is_cut(store: Store) -> None:
    many = store.list_summaries() * 3
    with pytest.raises(InputError, match=r"and 7 more$"):
        find_named_summaries(many, "xyz")


def test_a_size_need_not_be_given_where_there_is_one_only(store: Store) -> None:
    assert [
        s.image_size
        for s in filter_summaries_by_model(store.list_summaries(), dataset="birds", model="timm_lite1")
    ] == [96]


def test_several_sizes_are_listed(store: Store) -> None:
    with pytest.raises(InputError, match="several sizes, choose one with --image-size") as error:
        filter_summaries_by_model(store.list_summaries(), dataset="birds", model="timm_lite0")
    assert "64px" in str(error.value)
    assert "96px" in str(error.value)
    assert "lite1" not in str(error.value)
    one = filter_summaries_by_model(
        store.list_summaries(), dataset="birds", model="timm_lite0", image_size=64
    )
    assert [s.image_size for s in one] == [64]


def test_a_size_that_is_not_stored_is_answered_with_those_that_are(store: Store) -> None:
    with pytest.raises(InputError, match=r"no entry .* at 32 px: the store holds .*64px.*96px"):
        filter_summaries_by_model(store.list_summaries(), dataset="birds", model="timm_lite0", image_size=32)


def test_a_backbone_that_is_not_stored_is_answered_with_those_that_are(store: Store) -> None:
    with pytest.raises(InputError, match=r"no entry of cars through timm_lite2 in the store: it holds cars@"):
        filter_summaries_by_model(store.list_summaries(), dataset="cars", model="timm_lite2")


def test_a_tuning_entry_is_meant_only_when_it_is_named(store: Store) -> None:
    summaries = store.list_summaries()
    assert {s.role for s in find_named_summaries(summaries, "birds")} == {"full"}
    assert [s.role for s in find_named_summaries(summaries, "birds@tuning")] == ["tuning"]
    with pytest.raises(InputError, match="no entry 'cars@tuning'"):
        find_named_summaries(summaries, "cars@tuning")


def test_a_pin_means_exactly_one_entry_of_any_role(store: Store) -> None:
    for summary in store.list_summaries():
        for length in (12, 64):
            pin = f"{summary.dataset}@{summary.entry_digest[:length]}"
            assert find_named_summaries(store.list_summaries(), pin) == [summary]
    with pytest.raises(InputError, match="no entry 'birds@0123' in the store: it holds birds@"):
        find_named_summaries(store.list_summaries(), "birds@0123")


def test_the_pin_that_an_error_shows_selects_the_entry_it_describes(store: Store) -> None:
    for summary in store.list_summaries():
        assert find_named_summaries(store.list_summaries(), describe_entry(summary).split()[0]) == [summary]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"weights": "v"}, r"differs in the weights \(stored [0-9a-f]{12}, given v\)$"),
        (
            {"rule": "pooled"},
            r"differs in the architecture \(stored timm_lite1, pre-logits; given .*, pooled\)$",
        ),
        ({"weights": "v", "rule": "pooled"}, r"differs in the architecture .* and the weights .*$"),
    ],
)
def test_another_backbone_is_refused_with_the_part_that_differs(
    store: Store, change: dict[str, str], part: str
) -> None:
    candidates = filter_summaries_by_model(store.list_summaries(), dataset="birds", model="timm_lite1")
    assert open_entry_of_backbone(store, candidates, make_backbone_card("lite1", 96)).summary == candidates[0]
    with pytest.raises(InputError, match=part):
        open_entry_of_backbone(store, candidates, make_backbone_card("lite1", 96).model_copy(update=change))


def test_another_preprocessing_is_refused_with_what_differs(store: Store) -> None:
    card = make_backbone_card("lite1", 96)
    other = card.model_copy(
        update={"preprocessing": card.preprocessing.model_copy(update={"resampling": "bilinear"})}
    )
    with pytest.raises(InputError, match=r"the preprocessing \(resampling bicubic -> bilinear\)$"):
        open_entry_of_backbone(
            store,
            filter_summaries_by_model(store.list_summaries(), dataset="birds", model="timm_lite1"),
            other,
        )


def test_variants_of_the_same_data_are_listed_with_the_pins_that_tell_them_apart(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    add(store, 1, make_backbone_card("lite1", 96), dataset="birds")
    other = add(store, 6, make_backbone_card("lite1", 96), dataset="birds", options={"seed": 1})
    candidates = filter_summaries_by_model(store.list_summaries(), dataset="birds", model="timm_lite1")
    assert len(candidates) == 2
    with pytest.raises(InputError, match="several entries fit, pin one as NAME@DIGEST") as error:
        open_entry_of_backbone(store, candidates, make_backbone_card("lite1", 96))
    assert all(describe_entry(s) in str(error.value) for s in candidates)
    pinned = filter_summaries_by_model(
        store.list_summaries(), dataset=f"birds@{other.entry_digest[:12]}", model="timm_lite1"
    )
    assert open_entry_of_backbone(store, pinned, make_backbone_card("lite1", 96)).summary == other


def test_one_entry_is_found_without_loading_a_backbone(store: Store) -> None:
    summaries = store.list_summaries()
    assert select_only_summary(summaries, dataset="cars").dataset == "cars"
    assert (
        select_only_summary(summaries, dataset="birds", backbone_spec="lite0", image_size=64).image_size == 64
    )
    with pytest.raises(InputError, match="several entries fit, name --backbone or pin one"):
        select_only_summary(summaries, dataset="birds")
    with pytest.raises(InputError, match="no such entry of cars: the store holds cars@"):
        select_only_summary(summaries, dataset="cars", backbone_spec="lite1")


def test_an_array_that_an_entry_does_not_hold_is_answered_with_those_it_does(store: Store) -> None:
    entry = store.open_entry(select_only_summary(store.list_summaries(), dataset="cars"))
    assert "exemplar/image" not in entry
    with pytest.raises(InputError, match=r"holds no exemplar/image; it holds test/feature, .*, train/mean"):
        entry.read_array("exemplar/image")


def test_an_entry_whose_name_holds_an_at_sign_is_found_by_its_name(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    old = add(store, 1, make_backbone_card("lite0"), dataset="birds@2024")
    other = add(store, 2, make_backbone_card("lite1"), dataset="birds", fingerprint="d" * 64)
    for name in ("birds@2024", f"birds@2024@{old.entry_digest[:8]}"):
        assert select_only_summary(list_visible_and_pinned_summaries(store, name), dataset=name) == old
        assert find_summaries(store.list_summaries(), dataset=name) == [old]
        assert [g.summary for g in find_entry_history(store, name)] == [old]
    assert select_only_summary(store.list_summaries(), dataset=f"birds@{other.entry_digest[:8]}") == other
