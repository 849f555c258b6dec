"""Writing a run and making it visible: all or nothing."""

from pathlib import Path

import numpy as np
import pytest
from toy_entries import make_backbone_card, publish_with_placeholder_cards, write_random_arrays

from sfm.errors import InputError
from sfm.stats_store.digests import BLOCK_ROWS
from sfm.stats_store.objects import create_object, list_objects
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_or_create_store(str(tmp_path / "store"))


def test_different_backbone_dataset_or_options_give_separate_entries(store: Store) -> None:
    variants: list[dict[str, object]] = [
        {},
        {"backbone": make_backbone_card(weights_text="v")},
        {"fingerprint": "e" * 64},
        {"options": {"seed": 1}},
    ]
    for variant in variants:
        draft = Draft(store)
        write_random_arrays(draft)
        assert publish_with_placeholder_cards(draft, **variant).outcome == "published"  # type: ignore[arg-type]
    summaries = store.list_summaries()
    assert len({s.key for s in summaries}) == len({s.entry_digest for s in summaries}) == 4


def test_same_content_has_the_same_entry_digest_in_every_store(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        draft = Draft(open_or_create_store(str(tmp_path / name)))
        write_random_arrays(draft)
        digests.add(publish_with_placeholder_cards(draft).summary.entry_digest)
    assert len(digests) == 1


def test_array_written_in_blocks_equals_an_array_written_at_once(store: Store) -> None:
    array = np.random.default_rng(0).standard_normal((2 * BLOCK_ROWS + 5, 3)).astype(np.float32)
    whole, blocks = Draft(store), Draft(store)
    whole.write_array("test/feature", array)
    parts = (array[i : i + BLOCK_ROWS] for i in range(0, len(array), BLOCK_ROWS))
    blocks.write_array_blocks("test/feature", parts, array.shape, np.float32)
    assert whole.digests_by_array == blocks.digests_by_array
    whole_sha256s, block_sha256s = (
        {record.sha256 for record in draft.records_by_path.values()} for draft in (whole, blocks)
    )
    assert whole_sha256s == block_sha256s


def test_write_array_blocks_raises_value_error_on_a_shape_mismatch(store: Store) -> None:
    short = np.zeros((7, 2), np.float32)
    with pytest.raises(ValueError, match="7 rows given, 8 announced"):
        Draft(store).write_array_blocks("test/feature", [short], (8, 2), np.float32)
    with pytest.raises(ValueError, match=f"only the last block may be shorter than {BLOCK_ROWS} rows"):
        Draft(store).write_array_blocks("test/feature", [short, short], (14, 2), np.float32)


def test_temporary_file_of_an_object_is_not_listed(store: Store) -> None:
    folder = Path(store.url) / "index"
    folder.mkdir(exist_ok=True)
    (folder / "00000001.json#123456789012345678").write_bytes(b"half")
    assert all("#" not in item["path"] for item in list_objects(store.objects))
    create_object(store.objects, "index/00000001.json", b"whole")
    assert (folder / "00000001.json").read_bytes() == b"whole"


def test_creating_a_store_at_or_below_a_file_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as error:
            open_or_create_store(str(place))
        assert str(place) in str(error.value)
        assert "\n" not in str(error.value)
