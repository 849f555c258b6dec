"""A name, a backbone and a size mean one entry, or an error that lists what they could mean."""

from pathlib import Path

import pytest
from toy_entries import make_backbone_card, publish_with_placeholder_cards, write_random_arrays

from sfm.backbones.card import BackboneCard
from sfm.errors import InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_history import find_entry_history, list_visible_and_pinned_summaries
from sfm.stats_store.entry_selection import (
    describe_entry,
    filter_summaries_or_raise,
    find_named_summaries_or_raise,
    open_entry_of_backbone,
    select_model_summaries_of_one_size,
    select_only_summary,
)
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store


def publish_entry(store: Store, seed: int, backbone: BackboneCard, **more: object) -> Summary:
    draft = Draft(store)
    write_random_arrays(draft, seed)
    return publish_with_placeholder_cards(draft, backbone=backbone, **more).summary  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Birds through lite0 at two sizes and lite1 at one, with a tuning entry; cars through lite0."""
    store = open_or_create_store(str(tmp_path_factory.mktemp("store")))
    publish_entry(store, 1, make_backbone_card("lite0", 96), dataset="birds")
    publish_entry(store, 2, make_backbone_card("lite0", 64), dataset="birds")
    publish_entry(store, 3, make_backbone_card("lite1", 96), dataset="birds")
    publish_entry(
        store, 4, make_backbone_card("lite1", 96), dataset="birds", role="tuning", fingerprint="e" * 64
    )
    publish_entry(store, 5, make_backbone_card("lite0", 96), dataset="cars", fingerprint="d" * 64)
    return store


def test_unknown_dataset_name_suggests_close_matches(store: Store) -> None:
    with pytest.raises(InputError, match="no dataset 'bird' in the store: did you mean birds"):
        find_named_summaries_or_raise(store.list_summaries(), "bird")


def test_unknown_dataset_name_without_close_matches_lists_every_entry(store: Store) -> None:
    with pytest.raises(InputError, match="no dataset 'xyz' in the store: the store holds birds@") as error:
        find_named_summaries_or_raise(store.list_summaries(), "xyz")
    assert all(describe_entry(s) in str(error.value) for s in store.list_summaries())


def test_selecting_from_an_empty_store_reports_that_it_is_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the store holds nothing"):
        find_named_summaries_or_raise(open_or_create_store(str(tmp_path)).list_summaries(), "birds")


def test_long_list_of_candidates_is_truncated(store: Store) -> None:
    many = store.list_summaries() * 3
    with pytest.raises(InputError, match=r"and 7 more$"):
        find_named_summaries_or_raise(many, "xyz")


def test_image_size_is_optional_if_only_one_is_stored(store: Store) -> None:
    assert [
        s.image_size
        for s in select_model_summaries_of_one_size(
            store.list_summaries(), dataset="birds", model="timm_lite1"
        )
    ] == [96]


def test_ambiguous_image_size_lists_the_stored_sizes(store: Store) -> None:
    with pytest.raises(InputError, match="several sizes, choose one with --image-size") as error:
        select_model_summaries_of_one_size(store.list_summaries(), dataset="birds", model="timm_lite0")
    assert "64px" in str(error.value)
    assert "96px" in str(error.value)
    assert "lite1" not in str(error.value)
    one = select_model_summaries_of_one_size(
        store.list_summaries(), dataset="birds", model="timm_lite0", image_size=64
    )
    assert [s.image_size for s in one] == [64]


def test_missing_image_size_lists_the_stored_sizes(store: Store) -> None:
    with pytest.raises(InputError, match=r"no entry .* at 32 px: the store holds .*64px.*96px"):
        select_model_summaries_of_one_size(
            store.list_summaries(), dataset="birds", model="timm_lite0", image_size=32
        )


def test_missing_backbone_lists_the_stored_entries(store: Store) -> None:
    with pytest.raises(InputError, match=r"no entry of cars through timm_lite2 in the store: it holds cars@"):
        select_model_summaries_of_one_size(store.list_summaries(), dataset="cars", model="timm_lite2")


def test_tuning_entry_is_selected_only_by_its_role(store: Store) -> None:
    summaries = store.list_summaries()
    assert {s.role for s in find_named_summaries_or_raise(summaries, "birds")} == {"full"}
    assert [s.role for s in find_named_summaries_or_raise(summaries, "birds@tuning")] == ["tuning"]
    with pytest.raises(InputError, match="no entry 'cars@tuning'"):
        find_named_summaries_or_raise(summaries, "cars@tuning")


def test_pin_selects_exactly_one_entry_of_any_role(store: Store) -> None:
    for summary in store.list_summaries():
        for length in (12, 64):
            pin = f"{summary.dataset}@{summary.entry_digest[:length]}"
            assert find_named_summaries_or_raise(store.list_summaries(), pin) == [summary]
    with pytest.raises(InputError, match="no entry 'birds@0123' in the store: it holds birds@"):
        find_named_summaries_or_raise(store.list_summaries(), "birds@0123")


def test_pin_printed_in_an_error_selects_the_described_entry(store: Store) -> None:
    for summary in store.list_summaries():
        assert find_named_summaries_or_raise(store.list_summaries(), describe_entry(summary).split()[0]) == [
            summary
        ]


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
def test_different_backbone_is_refused_naming_the_differing_part(
    store: Store, change: dict[str, str], part: str
) -> None:
    candidates = select_model_summaries_of_one_size(
        store.list_summaries(), dataset="birds", model="timm_lite1"
    )
    assert open_entry_of_backbone(store, candidates, make_backbone_card("lite1", 96)).summary == candidates[0]
    with pytest.raises(InputError, match=part):
        open_entry_of_backbone(store, candidates, make_backbone_card("lite1", 96).model_copy(update=change))


def test_different_preprocessing_is_refused_naming_the_differing_field(store: Store) -> None:
    card = make_backbone_card("lite1", 96)
    other = card.model_copy(
        update={"preprocessing": card.preprocessing.model_copy(update={"resampling": "bilinear"})}
    )
    with pytest.raises(InputError, match=r"the preprocessing \(resampling bicubic -> bilinear\)$"):
        open_entry_of_backbone(
            store,
            select_model_summaries_of_one_size(store.list_summaries(), dataset="birds", model="timm_lite1"),
            other,
        )


def test_variants_of_a_dataset_are_listed_with_distinct_pins(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    publish_entry(store, 1, make_backbone_card("lite1", 96), dataset="birds")
    other = publish_entry(store, 6, make_backbone_card("lite1", 96), dataset="birds", options={"seed": 1})
    candidates = select_model_summaries_of_one_size(
        store.list_summaries(), dataset="birds", model="timm_lite1"
    )
    assert len(candidates) == 2
    with pytest.raises(InputError, match="several entries fit, pin one as NAME@DIGEST") as error:
        open_entry_of_backbone(store, candidates, make_backbone_card("lite1", 96))
    assert all(describe_entry(s) in str(error.value) for s in candidates)
    pinned = select_model_summaries_of_one_size(
        store.list_summaries(), dataset=f"birds@{other.entry_digest[:12]}", model="timm_lite1"
    )
    assert open_entry_of_backbone(store, pinned, make_backbone_card("lite1", 96)).summary == other


def test_entry_is_selected_without_loading_a_backbone(store: Store) -> None:
    summaries = store.list_summaries()
    assert select_only_summary(summaries, dataset="cars").dataset == "cars"
    assert (
        select_only_summary(summaries, dataset="birds", backbone_spec="lite0", image_size=64).image_size == 64
    )
    with pytest.raises(InputError, match="several entries fit, name --backbone or pin one"):
        select_only_summary(summaries, dataset="birds")
    with pytest.raises(InputError, match="no such entry of cars: the store holds cars@"):
        select_only_summary(summaries, dataset="cars", backbone_spec="lite1")


def test_missing_array_error_lists_the_arrays_of_the_entry(store: Store) -> None:
    entry = store.open_entry(select_only_summary(store.list_summaries(), dataset="cars"))
    assert "exemplar/image" not in entry
    with pytest.raises(InputError, match=r"holds no exemplar/image; it holds test/feature, .*, train/mean"):
        entry.read_array("exemplar/image")


def test_dataset_name_with_an_at_sign_is_found(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    old = publish_entry(store, 1, make_backbone_card("lite0"), dataset="birds@2024")
    other = publish_entry(store, 2, make_backbone_card("lite1"), dataset="birds", fingerprint="d" * 64)
    for name in ("birds@2024", f"birds@2024@{old.entry_digest[:8]}"):
        assert select_only_summary(list_visible_and_pinned_summaries(store, name), dataset=name) == old
        assert filter_summaries_or_raise(store.list_summaries(), dataset=name) == [old]
        assert [g.summary for g in find_entry_history(store, name)] == [old]
    assert select_only_summary(store.list_summaries(), dataset=f"birds@{other.entry_digest[:8]}") == other
