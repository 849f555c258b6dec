"""Writers race, readers read: every entry is whole, and nobody waits for anybody."""

import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from s3_faults import Proxy, Request, run_fault_proxy
from store_processes import (
    compute_toy_digests,
    make_fingerprint,
    make_forkserver_context,
    publish_after_event,
    publish_in_race,
    publish_many,
    start_process,
)
from toy_entries import publish_with_placeholder_cards, write_random_arrays

from sfm.errors import DamageError, InputError
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.location import connect_object_store
from sfm.stats_store.objects import list_objects
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

NO_AGE = datetime.timedelta(0)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A place for a store: a folder, or a prefix of a bucket."""
    if request.param == "disk":
        return str(request.getfixturevalue("tmp_path") / "store")
    request.getfixturevalue("proxy")
    return str(request.getfixturevalue("s3_url"))


@pytest.fixture
def proxy(s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that everything goes through; breaks nothing until told to."""
    with run_fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


class Reader(threading.Thread):
    """Reads every entry of a store again and again; notes which seed each was written from."""

    def __init__(self, url: str, seeds: list[int]) -> None:
        super().__init__()
        self.store = open_store(url)
        self.whole = {tuple(sorted(compute_toy_digests(seed).items())): seed for seed in seeds}
        self.done = threading.Event()
        self.entries = 0
        self.problems: list[str] = []
        self.seen: dict[str, set[int]] = {}

    def run(self) -> None:
        while not self.done.is_set():
            try:
                for summary in self.store.list_summaries():
                    entry = self.store.open_entry(summary)
                    found = tuple(
                        (name, compute_array_digest(entry.read_array(name)))
                        for name in entry.list_array_names()
                    )
                    self.entries += 1
                    if found in self.whole:
                        self.seen.setdefault(summary.fingerprint, set()).add(self.whole[found])
                    else:
                        self.problems.append(f"{summary.fingerprint}: a mixture")
            except (DamageError, InputError) as error:
                self.problems.append(str(error))


def list_run_ids(store: Store) -> set[str]:
    """Return the ids of all runs of which anything is there."""
    paths = [item["path"].split("/") for item in list_objects(store.objects, "runs")]
    return {parts[1] for parts in paths if len(parts) > 2}


@pytest.mark.parametrize(
    ("place", "rounds"),
    [
        ("disk", 5),
        ("s3", 2),
        pytest.param("disk", 50, marks=pytest.mark.torture),
        pytest.param("s3", 50, marks=pytest.mark.torture),
    ],
    indirect=["place"],
)
@pytest.mark.slow
def test_one_of_two_concurrent_writers_wins_and_readers_see_only_complete_entries(
    place: str, rounds: int
) -> None:
    context = make_forkserver_context()
    start, results = context.Barrier(2), context.Queue()
    open_or_create_store(place)
    reader = Reader(place, [1, 2])
    reader.start()
    writers = [
        start_process(context, publish_in_race, place, seed, rounds, start, results) for seed in (1, 2)
    ]
    reports = [results.get(timeout=120) for _ in range(2 * rounds)]
    for writer in writers:
        writer.join()
    reader.done.set()
    reader.join()

    winners = {number: seed for number, seed, _, outcome in reports if outcome == "published"}
    assert len(winners) == rounds
    assert len([r for r in reports if r[3] == "published"]) == rounds

    assert not reader.problems
    assert reader.entries
    assert all(seeds == {winners[int(fingerprint, 16)]} for fingerprint, seeds in reader.seen.items())

    store = open_store(place)
    collect_garbage(store, min_age=NO_AGE)
    assert list_run_ids(store) == {run for *_, run, outcome in reports if outcome == "published"}
    assert len(store.list_summaries()) == rounds
    assert [p for verdict in verify_entries(store) for p in verdict.problems] == []
    close = sum(outcome == "another writer was first" for *_, outcome in reports)
    where = "S3" if place.startswith("s3") else "disk"
    print(
        f"\ntorture: {rounds} races for one key on {where}: one winner each, {close} decided at the commit, "
        f"{reader.entries} whole entries read meanwhile"
    )


@pytest.mark.parametrize("fault", ["lose answer", "500 after"])
def test_commit_with_a_lost_response_is_recognised_as_published(
    proxy: Proxy, s3_url: str, fault: str
) -> None:
    store = open_or_create_store(s3_url)
    draft = Draft(store)
    write_random_arrays(draft, 1)
    hits: list[Request] = []

    def first_commit(request: Request) -> str | None:
        if request.creates and "/index/" in request.path and not hits:
            hits.append(request)
            return fault
        return None

    proxy.choose = first_commit  # type: ignore[assignment]
    assert publish_with_placeholder_cards(draft).outcome == "published"
    assert len(hits) == 1
    assert [s.fingerprint for s in store.list_summaries()] == ["f" * 64]
    assert all(verdict.is_sound for verdict in verify_entries(store))


def test_discard_keeps_the_run_of_a_commit_with_unknown_outcome(proxy: Proxy, s3_url: str) -> None:
    store = open_or_create_store(s3_url)
    draft = Draft(store)
    write_random_arrays(draft, 1)
    committed: list[Request] = []

    def deny_all_after_commit(request: Request) -> str | None:
        if committed:
            return "echo"
        if request.creates and "/index/" in request.path:
            committed.append(request)
            return "lose answer"
        return None

    proxy.choose = deny_all_after_commit  # type: ignore[assignment]
    with pytest.raises(InputError, match="s3://"):
        publish_with_placeholder_cards(draft)
    proxy.choose = lambda _: None
    draft.discard()
    assert [s.fingerprint for s in store.list_summaries()] == ["f" * 64]
    assert [v.problems for v in verify_entries(store)] == [[]]


@pytest.mark.parametrize("fault", ["unconditional", "501"])
def test_bucket_without_conditional_writes_is_refused_and_left_unchanged(
    proxy: Proxy, s3_url: str, fault: str
) -> None:
    proxy.choose = lambda request: fault if request.creates else None  # type: ignore[return-value,assignment]
    with pytest.raises(InputError, match=r"does not support conditional writes .* use another bucket"):
        open_or_create_store(s3_url)
    proxy.choose = lambda _: None
    assert list_objects(connect_object_store(s3_url)) == []
    open_or_create_store(s3_url)
    proxy.choose = lambda request: fault if request.creates else None  # type: ignore[return-value,assignment]
    with pytest.raises(InputError, match="does not support conditional writes"):
        open_or_create_store(s3_url)
    proxy.choose = lambda _: None
    assert open_store(s3_url).list_summaries() == []


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.torture)], indirect=True)
def test_a_stalled_writer_does_not_block_others(place: str) -> None:
    context = make_forkserver_context()
    written, go, results = context.Event(), context.Event(), context.Queue()
    slow = start_process(context, publish_after_event, place, 1, make_fingerprint(1), written, go, results)
    assert written.wait(60)
    os.kill(slow.pid or 0, signal.SIGSTOP)
    try:
        store = open_store(place)
        for fingerprint in (make_fingerprint(2), make_fingerprint(1)):
            draft = Draft(store)
            write_random_arrays(draft, 2)
            assert publish_with_placeholder_cards(draft, fingerprint=fingerprint).outcome == "published"
    finally:
        os.kill(slow.pid or 0, signal.SIGCONT)
    go.set()
    assert results.get(timeout=60) == "already there"
    slow.join()
    assert {s.fingerprint for s in store.list_summaries()} == {make_fingerprint(1), make_fingerprint(2)}
    assert all(verdict.is_sound for verdict in verify_entries(store))


@pytest.mark.parametrize(
    ("place", "entries"),
    [
        ("disk", 2),
        pytest.param("disk", 50, marks=pytest.mark.torture),
        pytest.param("s3", 10, marks=pytest.mark.torture),
    ],
    indirect=["place"],
)
def test_writers_of_different_keys_all_publish(place: str, entries: int) -> None:
    context = make_forkserver_context()
    open_or_create_store(place)

    def seconds(writers: int) -> float:
        start = context.Barrier(writers + 1)
        own = [[f"{writers:02x}{w:02x}{number:060x}" for number in range(entries)] for w in range(writers)]
        started = [start_process(context, publish_many, place, w, keys, start) for w, keys in enumerate(own)]
        start.wait()
        begin = time.perf_counter()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0] * writers
        return time.perf_counter() - begin

    alone, together = seconds(1), seconds(3)
    store = open_store(place)
    assert len(store.list_summaries()) == 4 * entries
    assert len(list_run_ids(store)) == 4 * entries
    print(
        f"\ntorture: writers of different keys, {'S3' if place.startswith('s3') else 'disk'}: one alone "
        f"{entries / alone:.0f} entries/s, three at once {3 * entries / together:.0f} entries/s"
    )


def test_entry_removed_during_its_replacement_ends_up_replaced(
    proxy: Proxy, s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_or_create_store(s3_url)
    first, second = Draft(store), Draft(store)
    write_random_arrays(first, 1)
    replaced = publish_with_placeholder_cards(first).summary
    write_random_arrays(second, 2)
    with monkeypatch.context() as without_proxy:
        without_proxy.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        other = open_store(s3_url)
    removed: list[Request] = []

    def remove_before_first_commit(request: Request) -> str | None:
        if request.creates and "/index/" in request.path and not removed:
            removed.append(request)
            remove_entry(other, replaced)
        return None

    proxy.choose = remove_before_first_commit  # type: ignore[assignment]
    published = publish_with_placeholder_cards(second, replace=True)
    assert removed
    assert (published.outcome, published.summary.generation) == ("published", 3)
    assert [s.generation for s in store.list_summaries()] == [3]
