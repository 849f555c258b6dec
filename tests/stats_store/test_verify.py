"""``verify_entries`` finds what is wrong, all of it, and names it; a sound store passes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from forged_entries import rewrite_commit
from s3_faults import run_fault_proxy
from toy_entries import make_backbone_card, publish_with_placeholder_cards, write_random_arrays

from sfm.events import Progress
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries
from sfm.stats_store.verified_objects import make_object_record


def publish_entry(store: Store, seed: int, **more: Any) -> Summary:
    draft = Draft(store)
    write_random_arrays(draft, seed)
    return publish_with_placeholder_cards(draft, fingerprint=f"{seed:064x}", **more).summary


@pytest.fixture(scope="module")
def original_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = open_or_create_store(str(tmp_path_factory.mktemp("original")))
    publish_entry(store, 1)
    publish_entry(store, 2)
    return Path(store.url)


@pytest.fixture
def store(original_store: Path, tmp_path: Path) -> Store:
    return open_store(str(shutil.copytree(original_store, tmp_path / "store")))


def get_run_folder(store: Store, summary: Summary) -> Path:
    return Path(store.url) / "runs" / store.open_entry(summary).commit.run


def test_verify_returns_a_sound_verdict_per_entry_of_a_sound_store(store: Store) -> None:
    verdicts = verify_entries(store)
    assert all(verdict.is_sound for verdict in verdicts)
    summaries = [verdict.summary for verdict in verdicts]
    assert sorted(s.fingerprint for s in summaries if s) == [f"{1:064x}", f"{2:064x}"]
    for verdict in verdicts:
        assert verdict.summary
        files = [f for f in get_run_folder(store, verdict.summary).rglob("*") if f.is_file()]
        assert (verdict.object_count, verdict.size_bytes) == (
            len(files),
            sum(f.stat().st_size for f in files),
        )


def test_verify_of_an_empty_store_returns_no_verdict(tmp_path: Path) -> None:
    assert verify_entries(open_or_create_store(str(tmp_path))) == []


def test_verify_checks_only_the_selected_entries(store: Store) -> None:
    first, second = store.list_summaries()
    (get_run_folder(store, second) / "train/mean/c/0/0").unlink()
    assert [v.is_sound for v in verify_entries(store, [first])] == [True]
    assert [v.is_sound for v in verify_entries(store, [second])] == [False]
    assert [(v.summary, v.is_sound) for v in verify_entries(store, [second, first])] == [
        (second, False),
        (first, True),
    ]


def test_verify_reports_every_damaged_object(store: Store) -> None:
    summary = store.list_summaries()[0]
    run = get_run_folder(store, summary)
    (run / "test/feature/c/0/0").write_bytes(b"")
    (run / "test/feature/c/1/0").unlink()
    (run / "test/label/zarr.json").write_bytes(b"{}")
    (run / "train/count/c/0").write_bytes(bytes(52))
    problems = verify_entries(store, [summary])[0].problems
    assert sorted(problem.split(":")[0] for problem in problems) == [
        f"damaged object runs/{run.name}/test/feature/c/0/0",
        f"damaged object runs/{run.name}/test/label/zarr.json",
        f"damaged object runs/{run.name}/train/count/c/0",
        f"missing object runs/{run.name}/test/feature/c/1/0",
    ]


def test_verify_recomputes_array_digests_from_the_chunks(store: Store) -> None:
    summary = store.list_summaries()[0]
    rewrite_commit(store, summary, lambda content: content["arrays"].update({"train/mean": "0" * 64}))
    (problem,) = verify_entries(store, [summary])[0].problems
    assert problem.endswith("/train/mean: its digest is not the published one")


def test_verify_detects_rewritten_values_with_a_matching_object_digest(
    store: Store,
) -> None:
    summary = store.list_summaries()[0]
    array = zarr.open_array(get_run_folder(store, summary) / "train/mean", mode="r+")
    array[0, 0] = np.nextafter(array[0, 0], 9)  # type: ignore[call-overload]
    chunk = (get_run_folder(store, summary) / "train/mean/c/0/0").read_bytes()
    record = make_object_record(chunk).model_dump()
    rewrite_commit(store, summary, lambda content: content["objects"].update({"train/mean/c/0/0": record}))
    (problem,) = verify_entries(store, [summary])[0].problems
    assert problem.endswith("/train/mean: its digest is not the published one")


def test_verify_reports_an_undecodable_chunk_with_a_matching_object_digest(store: Store) -> None:
    summary = store.list_summaries()[0]
    chunk = get_run_folder(store, summary) / "train/mean/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1  # CRC32C
    chunk.write_bytes(data)
    record = make_object_record(bytes(data)).model_dump()
    rewrite_commit(store, summary, lambda content: content["objects"].update({"train/mean/c/0/0": record}))
    (problem,) = verify_entries(store, [summary])[0].problems
    assert "/train/mean: it cannot be decoded" in problem


def test_verify_reports_a_chunk_missing_from_the_commit(store: Store) -> None:
    summary = store.list_summaries()[0]
    rewrite_commit(store, summary, lambda content: content["objects"].pop("test/feature/c/1/0"))
    (problem,) = verify_entries(store, [summary])[0].problems
    assert "test/feature/c/1/0: the commit does not list it" in problem


@pytest.mark.parametrize(
    ("card", "field", "part"),
    [
        ("backbone", "weights", "backbone_hash"),
        ("dataset", "fingerprint", "fingerprint"),
        ("extraction", "options", "options"),
    ],
)
def test_verify_reports_cards_that_contradict_the_key(store: Store, card: str, field: str, part: str) -> None:
    summary = store.list_summaries()[0]
    file = get_run_folder(store, summary) / "zarr.json"
    group = json.loads(file.read_bytes())
    group["attributes"][card][field] = {"seed": 9} if field == "options" else "9" * 64
    file.write_text(json.dumps(group))
    record = make_object_record(file.read_bytes()).model_dump()
    rewrite_commit(store, summary, lambda content: content["objects"].update({"zarr.json": record}))
    problems = verify_entries(store, [summary])[0].problems
    assert any(f"its {part} differ from the commit's" in problem for problem in problems)


def test_verify_reports_damaged_older_commits_but_not_their_deleted_runs(store: Store) -> None:
    old = store.list_summaries()[0]
    run = get_run_folder(store, old)
    publish_entry(store, 1, replace=True)
    for file in run.rglob("c/**/*"):
        if file.is_file():
            file.unlink()
    assert all(verdict.is_sound for verdict in verify_entries(store))
    (Path(store.url) / "index" / old.key / "00000001.json").write_bytes(b"{}")
    assert [v.commit_path for v in verify_entries(store) if not v.is_sound] == [
        f"index/{old.key}/00000001.json"
    ]


def test_verify_skips_removed_entries(store: Store) -> None:
    first, second = store.list_summaries()
    remove_entry(store, first)
    assert [v.summary for v in verify_entries(store)] == [second]


def test_verify_progress_counts_every_object_once(store: Store) -> None:
    told: list[Progress] = []
    verdicts = verify_entries(store, progress=told.append)
    told = [event for event in told if event.stage == "verify"]
    assert told[0].done == 0
    assert told[-1].done == told[-1].total == sum(v.object_count for v in verdicts)
    assert [p.done for p in told] == sorted(p.done for p in told)


def test_verify_requests_every_object_once(
    s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_or_create_store(s3_url)
        publish_entry(store, 1, backbone=make_backbone_card())
        before = len(proxy.seen)
        assert verify_entries(store)[0].is_sound
        asked = [request.path for request in proxy.seen[before:]]
    # The listing, the commit, and what the commit lists.
    assert len(asked) == len(set(asked)) == 2 + 15
