"""Replacing, removing and pinning: what readers see, and what stays on record."""

import pytest
from toy_entries import make_backbone_card, publish_with_placeholder_cards, write_random_arrays

from sfm.errors import InputError
from sfm.stats_store.entry_history import (
    find_entries_merged_from_removed,
    find_entry_history,
    list_visible_and_pinned_summaries,
    read_commit_statuses,
    remove_entry,
)
from sfm.stats_store.entry_selection import filter_summaries_or_raise, select_only_summary
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store


@pytest.fixture
def store(tmp_path) -> Store:
    """An empty store in a folder."""
    return open_or_create_store(str(tmp_path / "s"))


def publish_entry(store: Store, seed: int = 0, **words):
    """Publish a toy entry; returns its summary and its arrays."""
    draft = Draft(store)
    arrays = write_random_arrays(draft, seed)
    return publish_with_placeholder_cards(draft, **words).summary, arrays


def list_commit_states(store: Store) -> list[tuple[int, str]]:
    return [(g.generation, g.state) for g in read_commit_statuses(store)]


def test_entries_with_different_options_are_ambiguous_by_name(store):
    publish_entry(store, 0, options={"seed": 0})
    publish_entry(store, 0, options={"seed": 1})
    assert len(store.list_summaries()) == 2
    with pytest.raises(InputError, match="several entries fit"):
        select_only_summary(store.list_summaries(), dataset="toy")


def test_pin_selects_the_newest_generation_of_equal_content(store):
    first, _ = publish_entry(store, 0)
    publish_entry(store, 0, replace=True)
    publish_entry(store, 1, replace=True)
    pin = f"toy@{first.entry_digest}"
    assert select_only_summary(list_visible_and_pinned_summaries(store, pin), dataset=pin).generation == 2


def test_removed_entry_is_hidden_and_cannot_be_pinned(store):
    old, _ = publish_entry(store, 0)
    new, _ = publish_entry(store, 1, replace=True)
    remove_entry(store, new)
    assert store.list_summaries() == []
    for summary in (old, new):
        with pytest.raises(InputError, match="no dataset 'toy'"):
            select_only_summary(
                list_visible_and_pinned_summaries(store, f"toy@{summary.entry_digest}"), dataset="toy"
            )


def test_tombstone_records_the_removed_entry_and_the_time(store):
    summary, _ = publish_entry(store, 0)
    before = summary.created
    tombstone = remove_entry(store, summary)
    assert tombstone.summary.entry_digest == summary.entry_digest
    assert tombstone.summary.created >= before
    assert [(g.generation, g.state) for g in find_entry_history(store, "toy")] == [
        (1, "removed"),
        (2, "tombstone"),
    ]


def test_removing_an_entry_twice_is_refused(store):
    summary, _ = publish_entry(store, 0)
    remove_entry(store, summary)
    with pytest.raises(InputError, match="replaced or removed meanwhile"):
        remove_entry(store, summary)


def test_history_is_grouped_by_key_and_filtered_by_backbone(tmp_path):
    store = open_or_create_store(str(tmp_path / "s"))
    publish_entry(store, 0)
    publish_entry(store, 1, backbone=make_backbone_card("lite1"))
    publish_entry(store, 2, backbone=make_backbone_card("lite1"), replace=True)
    assert [(g.generation, g.state) for g in find_entry_history(store, "toy", backbone_spec="lite1")] == [
        (1, "replaced"),
        (2, "current"),
    ]
    assert len(find_entry_history(store, "toy")) == 3
    with pytest.raises(InputError, match="no dataset 'toys'"):
        find_entry_history(store, "toys")


def test_find_summaries_returns_every_match(tmp_path):
    store = open_or_create_store(str(tmp_path / "s"))
    publish_entry(store, 0)
    publish_entry(store, 1, backbone=make_backbone_card("lite1"))
    publish_entry(store, 2, role="tuning", options={"role": "tuning"}, fingerprint="e" * 64)
    visible = store.list_summaries()
    assert (
        len(filter_summaries_or_raise(visible)) == len(filter_summaries_or_raise(visible, dataset="toy")) == 3
    )
    assert len(filter_summaries_or_raise(visible, dataset="toy@tuning")) == 1
    assert len(filter_summaries_or_raise(visible, backbone_spec="lite0")) == 2
    with pytest.raises(InputError, match="no entry fits: the store holds toy@"):
        filter_summaries_or_raise(visible, dataset="toy", backbone_spec="lite2")


def test_entries_merged_from_a_removed_entry_are_found(tmp_path):
    store = open_or_create_store(str(tmp_path / "s"))
    part, _ = publish_entry(store, 0, fingerprint="a" * 64)
    union, _ = publish_entry(store, 1, fingerprint="b" * 64, leaves=["a" * 64, "c" * 64], dataset="union")
    publish_entry(store, 2, fingerprint="c" * 64, dataset="other")
    assert find_entries_merged_from_removed(store, store.list_summaries(), [part]) == [union]
