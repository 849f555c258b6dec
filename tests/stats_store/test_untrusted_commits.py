"""Anybody may have written a commit: what none of ours would say is damage, named, and harms no other."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import obstore
import pytest
from forged_entries import rewrite_commit
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from peak_memory import peak_memory
from s3_server import REGION
from toy_entries import publish_random_entry

from sfm.errors import DamageError, InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.commits import (
    MAX_RUN_METADATA_BYTES,
    encode_commit_with_digest,
    make_commit_path,
    parse_commit,
    parse_entry_cards,
    parse_store_schema_version,
)
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import find_entry_history, read_commit_statuses, remove_entry
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.objects import read_object
from sfm.stats_store.schema import UpgradeNeededError, is_array_in_schema
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries
from sfm.stats_store.verified_objects import make_object_record
from sfm.text import sanitize_line
from sfm.untrusted_files import MAX_JSON_BYTES

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 10**9, 10**30, -(10**40), 2**31, 2**63]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["", ".", "../../x", "a//b", "/etc", "f" * 64, "F" * 64, "²", "٣", "\0", "9" * 400]),
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


def list_json_paths(document: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value in a JSON document: the names and numbers that lead to it."""
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    return [
        place
        for name, value in inner
        for place in [
            (*above, name),
            *(list_json_paths(value, (*above, name)) if isinstance(value, dict | list) else []),
        ]
    ]


def replace_value(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a JSON document with another value in one place."""
    copied = json.loads(json.dumps(document))
    inner = copied
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return copied


MEMORY = MemoryStore()
SOUND = publish_random_entry(open_or_create_store(MEMORY))
PATH = make_commit_path(SOUND)
COMMIT = open_store(MEMORY).read_commit(PATH)
CONTENT = json.loads(bytes(obstore.get(MEMORY, PATH).bytes()))["commit"]
CARDS = json.loads(bytes(obstore.get(MEMORY, f"runs/{COMMIT.run}/zarr.json").bytes()))


@given(place=st.sampled_from(list_json_paths(CONTENT)), value=VALUES)
@settings(max_examples=100, deadline=None)
def test_commit_with_any_changed_value_parses_or_raises_naming_its_path(place, value):
    complaint = PATH
    try:
        parse_commit(encode_commit_with_digest(replace_value(CONTENT, place, value)), PATH)
    except (DamageError, UpgradeNeededError) as error:
        complaint = str(error)
    assert PATH in complaint
    assert complaint == sanitize_line(complaint)


@given(place=st.sampled_from(list_json_paths(CARDS)), value=VALUES)
@settings(max_examples=100, deadline=None)
def test_cards_with_any_changed_value_parse_or_raise_naming_the_run(place, value):
    complaint = COMMIT.run
    try:
        parse_entry_cards(COMMIT, json.dumps(replace_value(CARDS, place, value)).encode())
    except (DamageError, UpgradeNeededError) as error:
        complaint = str(error)
    assert COMMIT.run in complaint
    assert complaint == sanitize_line(complaint)


@given(data=st.binary(max_size=60))
@settings(max_examples=50, deadline=None)
def test_random_bytes_as_a_commit_raise_damage_error(data):
    with pytest.raises(DamageError, match="not readable as a commit"):
        parse_commit(data, PATH)
    with pytest.raises(DamageError):
        parse_store_schema_version(data)


BAD_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "a//b",
    "/a",
    "a/",
    "a/../b",
    "a\\b",
    "a\0",
    "a\nb",
    "é",
    "a" * 256,
    "a\n",
)

RULES: list[tuple[tuple[Any, ...], Any]] = [
    (("kind",), "alias"),
    (("schema",), None),
    (("schema", "major"), -1),
    (("schema", "minor"), 10**9),
    (("schema", "requires"), ["x"] * 101),
    (("summary",), None),
    (("summary", "dataset"), "x" * 1001),
    (("summary", "backbone"), "x" * 1001),
    (("summary", "classes"), 0),
    (("summary", "features"), 10**9),
    (("summary", "train_samples"), -1),
    (("summary", "image_size"), 0),
    (("summary", "image_size"), 10**9),
    (("summary", "held_out_top1"), 1.5),
    (("summary", "listing"), "../x"),
    (("summary", "entry_digest"), "0" * 64),
    (("arrays",), {f"a{number}": "0" * 64 for number in range(1001)}),
    (("arrays", "train/mean"), "0" * 63),
    (("arrays", "../mean"), "0" * 64),
    (("arrays", "train/lost"), "0" * 64),
    (("objects",), {}),
    (("objects", "zarr.json", "size"), -1),
    (("objects", "zarr.json", "size"), 2**31 + 1),
    (("objects", "zarr.json", "size"), MAX_RUN_METADATA_BYTES + 1),
    (("objects", "zarr.json", "sha256"), "F" * 64),
    *((("objects", name), {"size": 1, "sha256": "0" * 64}) for name in BAD_NAMES),
]


@pytest.mark.parametrize(("place", "value"), RULES, ids=[f"{'.'.join(p)}={str(v)[:12]!r}" for p, v in RULES])
def test_invalid_commit_raises_damage_error_naming_its_path(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(DamageError, match=rf"^damaged commit {PATH}: "):
        parse_commit(encode_commit_with_digest(replace_value(CONTENT, place, value)), PATH)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b'{"commit":' * 300,
        encode_commit_with_digest(CONTENT).replace(b'"kind"', b'"kind": "entry", "kind"'),
        encode_commit_with_digest(CONTENT).replace(b'"held_out_top1": 0.5', b'"held_out_top1": NaN'),
        encode_commit_with_digest(CONTENT).replace(b'"dataset": "toy"', b'"dataset": "\\ud800"'),
        encode_commit_with_digest(CONTENT).replace(b'"generation": 1', b'"generation": ' + b"1" * 5000),
        encode_commit_with_digest(CONTENT) + b" " * MAX_JSON_BYTES,
    ],
    ids=["empty", "deep list", "deep object", "name twice", "NaN", "surrogate", "long number", "long"],
)
def test_malformed_or_oversized_commit_json_raises_damage_error(data: bytes) -> None:
    with pytest.raises(DamageError, match="not readable as a commit"):
        parse_commit(data, PATH)


LYING: list[tuple[tuple[str, ...], Any]] = [
    (("backbone", "weights"), "0" * 64),
    (("backbone", "features"), 7),
    (("backbone", "spec"), "lite1"),
    (("dataset", "name"), "birds"),
    (("dataset", "fingerprint"), "0" * 64),
    (("dataset", "class_ids"), ["a", "b", "c"]),
    (("dataset", "class_ids"), ["a", "b", "c", "c"]),
    (("dataset", "class_names"), ["a", "b", "c"]),
    (("dataset", "class_names"), ["a", "b", "c", "d" * 1001]),
    (("dataset", "train_samples"), 21),
    (("dataset", "leaves"), ["x"]),
    (("extraction", "role"), "tuning"),
    (("extraction", "options"), {"seed": 1}),
    (("extraction", "seconds"), float("inf")),
    (("extraction", "options"), {"seed": float("nan")}),
    (("classifier", "held_out_top1"), 0.75),
    (("backbone", "preprocessing", "std"), [0, 1, 1]),
    (("backbone", "preprocessing", "mean"), [float("nan"), 0, 0]),
    (("backbone", "preprocessing", "input_size"), 10**9),
    (("backbone", "preprocessing", "resampling"), "nearest"),
    (("backbone", "preprocessing", "gamma"), 2.2),
]


@pytest.mark.parametrize(("place", "value"), LYING, ids=[f"{'.'.join(p)}={str(v)[:12]}" for p, v in LYING])
def test_invalid_or_contradictory_cards_raise_damage_error(place: tuple[str, ...], value: Any) -> None:
    data = json.dumps(replace_value(CARDS, ("attributes", *place), value)).encode()
    with pytest.raises(DamageError, match=rf"^damaged object runs/{COMMIT.run}/zarr\.json: "):
        parse_entry_cards(COMMIT, data)


def test_entry_with_cards_contradicting_the_commit_cannot_be_opened(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    summary = publish_random_entry(store)
    file = tmp_path / "runs" / store.open_entry(summary).commit.run / "zarr.json"
    file.write_text(file.read_text().replace('"name": "toy"', '"name": "yot"'))
    record = make_object_record(file.read_bytes()).model_dump()
    rewrite_commit(store, summary, lambda content: content["objects"].update({"zarr.json": record}))
    with pytest.raises(DamageError, match=r"zarr\.json: its dataset differ from the commit's"):
        store.open_entry(store.list_summaries()[0])


BAD_RUNS: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "folder": lambda run: run + "/",
    "below": lambda run: run + "/train",
    "above": lambda _: "../../x",
    "upper": str.upper,
    "newline": lambda run: run + "\n",
}


def publish_victim_and_attacker(store: Store, bad: Callable[[str], str]) -> tuple[Summary, Summary]:
    """Publish a victim's entry, and a stranger's, whose replaced first commit names a run that is none."""
    victim = publish_random_entry(store, 1, fingerprint="1" * 64, dataset="victim")
    old = publish_random_entry(store, 2, fingerprint="2" * 64, dataset="stranger")
    new = publish_random_entry(store, 3, fingerprint="2" * 64, dataset="stranger", replace=True)
    content = json.loads(bytes(obstore.get(store.objects, make_commit_path(old)).bytes()))["commit"]
    content["run"] = bad(store.open_entry(victim).commit.run)
    obstore.put(store.objects, make_commit_path(old), encode_commit_with_digest(content))
    return victim, new


@pytest.mark.parametrize(
    ("place", "bad"), [*(("disk", bad) for bad in BAD_RUNS), ("s3", "empty"), ("s3", "below")]
)
def test_invalid_run_id_in_a_commit_does_not_affect_other_entries(
    place: str, bad: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = open_or_create_store(
        str(tmp_path / "store") if place == "disk" else request.getfixturevalue("s3_url")
    )
    victim, new = publish_victim_and_attacker(store, BAD_RUNS[bad])
    gone = publish_random_entry(store, 4, fingerprint="3" * 64, dataset="gone")
    remove_entry(store, gone)
    done = collect_garbage(store, delete_replaced_now=True)
    (note,) = done.notes
    assert f"damaged commit {make_commit_path(new).replace('00000002', '00000001')}: run: " in note
    assert [g.reason for g in done.deleted] == ["removed"]
    assert {s.dataset for s in store.list_summaries()} == {"victim", "stranger"}
    assert [v.is_sound for v in verify_entries(store) if v.summary] == [True, True]
    assert [g.state for g in find_entry_history(store, "stranger")] == ["unreadable", "current"]
    assert len(read_commit_statuses(store)) == 4
    remove_entry(store, new)
    assert collect_garbage(store, delete_replaced_now=True).deleted == []
    target = open_or_create_store(str(tmp_path / "target"))
    assert [c.outcome for c in copy_entries(store, target, store.list_summaries())] == ["copied"]
    assert store.list_summaries() == [victim]


@pytest.mark.parametrize("name", ["0000000²", "0000000٣", "1", "000000001", "0000000a", "-0000001"])
def test_index_files_not_named_like_a_commit_are_ignored(name: str, tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    summary = publish_random_entry(store)
    for ending in (".json", ".published"):
        (tmp_path / "index" / summary.key / f"{name}{ending}").write_bytes(b"{}")
        other = tmp_path / "index" / "x" / "y" / "z"
        other.mkdir(parents=True, exist_ok=True)
        (other / f"00000001{ending}").write_bytes(b"{}")
    assert store.list_summaries_and_problems() == ([summary], [])
    assert collect_garbage(store, delete_replaced_now=True).notes == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "sparse"])
def test_special_file_as_a_commit_or_object_is_damage_without_blocking(kind: str, tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    kept, summary = publish_random_entry(store, 1, fingerprint="1" * 64), publish_random_entry(store, 2)
    run = tmp_path / "runs" / store.open_entry(summary).commit.run

    def put_there(path: Path) -> None:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(2**40)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else path)

    put_there(run / "train" / "count" / "zarr.json")
    with pytest.raises(DamageError, match=r"^damaged object runs/.*/train/count/zarr\.json: "):
        store.open_entry(summary)
    assert [v.is_sound for v in verify_entries(store)].count(True) == 1
    put_there(tmp_path / make_commit_path(summary))
    entries, reasons = store.list_summaries_and_problems()
    assert entries == [kept]
    assert all(make_commit_path(summary) in reason for reason in reasons)
    assert reasons


def test_read_object_refuses_an_object_larger_than_the_limit(tmp_path: Path, s3_url: str) -> None:
    for store in (
        open_or_create_store(str(tmp_path)),
        open_or_create_store(s3_url),
        open_or_create_store(MemoryStore()),
    ):
        obstore.put(store.objects, "index/big", b"x" * 100)
        assert read_object(store.objects, "index/big", len, 100) == 100
        with pytest.raises(DamageError, match="it has 100 bytes, at most 99 are read"):
            read_object(store.objects, "index/big", len, 99)


def test_invalid_object_name_in_a_bucket_is_reported(s3_url: str, s3_endpoint: str) -> None:
    store = open_or_create_store(s3_url)
    parts = urlsplit(s3_url)
    client = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name=REGION,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    key = f"{parts.path.lstrip('/')}/index//x".lstrip("/")
    client.put_object(Bucket=parts.netloc, Key=key, Body=b"")
    with pytest.raises(InputError, match=r"invalid name \(.*index//x\), at which .*: delete it"):
        store.list_summaries()
    client.delete_object(Bucket=parts.netloc, Key=key)
    assert store.list_summaries() == []


@pytest.mark.parametrize("part", ["objects", "class_names"])
def test_many_invalid_items_are_refused_within_bounded_memory(part: str) -> None:
    if part == "class_names":
        data = json.dumps(replace_value(CARDS, ("attributes", "dataset", part), [0] * 300_000)).encode()
    else:
        data = encode_commit_with_digest(
            replace_value(CONTENT, (part,), dict.fromkeys(map(str, range(150_000)), 0))
        )
    with peak_memory() as growth, pytest.raises(DamageError):
        parse_entry_cards(COMMIT, data) if part == "class_names" else parse_commit(data, PATH)
    assert growth[0] < 100 * 2**20


def test_last_generation_of_a_key_cannot_be_replaced_or_removed(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    summary = publish_random_entry(store)
    last = summary.model_copy(update={"generation": 99_999_999})
    (tmp_path / make_commit_path(last)).write_bytes(
        encode_commit_with_digest(
            replace_value(
                json.loads((tmp_path / make_commit_path(summary)).read_bytes())["commit"],
                ("summary", "generation"),
                99_999_999,
            )
        )
    )
    assert store.list_summaries() == [last]
    with pytest.raises(InputError, match=r"holds the last possible generation: delete 99999999\.json"):
        publish_random_entry(store, 1, replace=True)
    with pytest.raises(InputError, match="the last possible generation"):
        remove_entry(store, last)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("train/centre_5", True),
        ("train/centre_count_10", True),
        ("train/count", True),
        ("train/count_5", False),
        ("train/centre", False),
        ("train/centre_", False),
        ("train/centre_05", False),
        ("train/centre_٣", False),
        ("train/centre_99999999", False),
    ],
)
def test_is_array_in_schema_accepts_only_schema_names(name: str, known: bool) -> None:
    assert is_array_in_schema(name) == known
