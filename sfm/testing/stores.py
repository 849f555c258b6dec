"""The contract of a store at any location, as tests to inherit; see :class:`StoreTests`."""

import datetime
import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import obstore
import pytest
from obstore.store import MemoryStore, ObjectStore

from sfm.backbones.card import BackboneCard, Preprocessing
from sfm.errors import DamageError, InputError
from sfm.stats_store.cards import ClassifierCard, DatasetCard, ExtractionCard, Summary
from sfm.stats_store.commits import encode_commit_with_digest, make_commit_path
from sfm.stats_store.digests import compute_entry_digest, compute_sha256
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import (
    list_visible_and_pinned_summaries,
    read_commit_statuses,
    remove_entry,
)
from sfm.stats_store.entry_selection import select_only_summary
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.publication import Draft, PublishResult, publish_draft
from sfm.stats_store.schema import UpgradeNeededError
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

Arrays = dict[str, npt.NDArray[Any]]

CLASSES, FEATURES, TRAIN_SAMPLES, TEST_SAMPLES = 4, 6, 20, 5000

WRITERS = 4
"""Concurrent writers of one key."""

NO_AGE = datetime.timedelta(0)

CLASSIFIER = ClassifierCard(
    solver="none", l2=1.0, iterations=1, converged=True, held_out_top1=0.5, held_out_top5=None
)


class StoreTests:
    """The contract of a store: every test states one promise in its docstring.

    A subclass gives the fixture `location`, and is collected by pytest if its name begins with ``Test``. The
    tests leave small objects there.

    Examples
    --------
    >>> class TestStoreInFolder(StoreTests):
    ...     @pytest.fixture
    ...     def location(self, tmp_path):
    ...         return str(tmp_path / "store")
    """

    @pytest.fixture
    def location(self) -> str | ObjectStore:
        """An empty location for a store: a path, a URL, or an obstore store."""
        raise NotImplementedError("give a fixture `location` that returns a path, a URL or an obstore store")

    @pytest.fixture
    def store(self, location: str | ObjectStore) -> Store:
        """An empty store at the location."""
        return open_or_create_store(location)

    def test_a_store_is_created_once(self, location: str | ObjectStore) -> None:
        """A location without a store is refused; creating a store twice opens the same one."""
        with pytest.raises(InputError):
            open_store(location)
        publish_random_entry(open_or_create_store(location))
        assert open_or_create_store(location).list_summaries() == open_store(location).list_summaries() != []

    def test_arrays_are_read_as_they_were_written(self, location: str | ObjectStore, store: Store) -> None:
        """Every array is read with the type, shape and values with which it was written."""
        draft = Draft(store)
        written = write_random_arrays(draft)
        entry = open_store(location).open_entry(publish_with_placeholder_cards(draft).summary)
        assert entry.list_array_names() == sorted(written)
        for name, array in written.items():
            assert entry.read_array(name).dtype == array.dtype
            np.testing.assert_array_equal(entry.read_array(name), array)
            np.testing.assert_array_equal(entry.read_array(name, slice(1, 3)), array[1:3])

    def test_an_entry_is_invisible_until_all_of_it_is_published(self, store: Store) -> None:
        """A reader sees complete entries only: nothing of a draft, all of a published entry."""
        draft = Draft(store)
        write_random_arrays(draft)
        assert store.list_summaries_and_problems() == ([], [])
        summary = publish_with_placeholder_cards(draft).summary
        assert store.list_summaries_and_problems() == ([summary], [])
        assert [verdict.problems for verdict in verify_entries(store)] == [[]]

    def test_a_discarded_draft_leaves_no_object(self, store: Store) -> None:
        """A draft that is not published can be deleted without a trace."""
        before = read_all_objects(store)
        draft = Draft(store)
        write_random_arrays(draft)
        draft.discard()
        assert read_all_objects(store) == before

    def test_exactly_one_of_several_writers_of_a_key_wins(
        self, location: str | ObjectStore, store: Store
    ) -> None:
        """Of several writers of one key exactly one publishes; the others notice and discard their runs."""
        barrier = threading.Barrier(WRITERS)

        def publish_at_once(seed: int) -> PublishResult:
            draft = Draft(open_store(location))
            write_random_arrays(draft, seed)
            barrier.wait(60)
            return publish_with_placeholder_cards(draft)

        with ThreadPoolExecutor(WRITERS) as pool:
            results = list(pool.map(publish_at_once, range(WRITERS)))
        outcomes = [result.outcome for result in results]
        assert outcomes.count("published") == 1
        assert set(outcomes) <= {"published", "already there", "another writer was first"}
        (summary,) = store.list_summaries()
        assert {result.summary.entry_digest for result in results} == {summary.entry_digest}
        assert list_run_ids(store) == {store.read_entry_commit(summary).run}

    def test_writers_of_different_keys_all_publish(self, location: str | ObjectStore, store: Store) -> None:
        """Writers of different keys do not block each other."""

        def publish_dataset(number: int) -> PublishResult:
            draft = Draft(open_store(location))
            write_random_arrays(draft, number)
            return publish_with_placeholder_cards(draft, fingerprint=f"{number:064x}")

        with ThreadPoolExecutor(WRITERS) as pool:
            results = list(pool.map(publish_dataset, range(WRITERS)))
        assert {result.outcome for result in results} == {"published"}
        assert [verdict.is_sound for verdict in verify_entries(store)] == [True] * WRITERS

    def test_a_key_that_is_published_is_not_published_again(self, store: Store) -> None:
        """Publishing under an existing key changes nothing unless `replace` is given."""
        first = publish_random_entry(store)
        before = read_all_objects(store)
        draft = Draft(store)
        write_random_arrays(draft, seed=1)
        result = publish_with_placeholder_cards(draft)
        assert (result.outcome, result.summary) == ("already there", first)
        assert read_all_objects(store) == before

    def test_no_object_is_ever_overwritten(self, store: Store) -> None:
        """Publishing, replacing and removing add objects and change none."""
        steps: list[Callable[[], object]] = [
            lambda: publish_random_entry(store),
            lambda: publish_random_entry(store, seed=1, replace=True),
            lambda: remove_entry(store, store.list_summaries()[0]),
            lambda: publish_random_entry(store, seed=2),
        ]
        for step in steps:
            before = read_all_objects(store)
            step()
            assert before.items() < read_all_objects(store).items()
        statuses = [(status.generation, status.state) for status in read_commit_statuses(store)]
        assert statuses == [(1, "removed"), (2, "removed"), (3, "tombstone"), (4, "current")]

    def test_a_replaced_entry_can_be_pinned_until_garbage_collection(self, store: Store) -> None:
        """``NAME@DIGEST`` means the same content after a replacement; the name alone means the new one."""
        old = publish_random_entry(store)
        new = publish_random_entry(store, seed=1, replace=True)
        pin = f"toy@{old.entry_digest[:12]}"
        assert select_only_summary(list_visible_and_pinned_summaries(store, pin), dataset=pin) == old
        assert list_visible_and_pinned_summaries(store, "toy") == [new]
        assert store.open_entry(old).read_array("train/count").sum() == TRAIN_SAMPLES

    def test_a_removed_entry_is_hidden_and_stays_until_garbage_collection(self, store: Store) -> None:
        """A removed entry is gone for readers; its objects stay until `collect_garbage` deletes them."""
        summary = publish_random_entry(store)
        before = read_all_objects(store)
        remove_entry(store, summary)
        assert store.list_summaries_and_problems() == ([], [])
        assert before.items() < read_all_objects(store).items()
        assert [garbage.reason for garbage in collect_garbage(store, delete_replaced_now=True).deleted] == [
            "removed"
        ]
        assert list_run_ids(store) == set()
        assert [status.state for status in read_commit_statuses(store)] == ["tombstone"]
        assert publish_random_entry(store).generation == 3

    def test_an_entry_that_changed_meanwhile_is_not_removed(self, store: Store) -> None:
        """Removing an entry that another writer has replaced or removed is refused."""
        old = publish_random_entry(store)
        new = publish_random_entry(store, seed=1, replace=True)
        with pytest.raises(InputError, match="replaced or removed meanwhile"):
            remove_entry(store, old)
        assert store.list_summaries() == [new]

    def test_garbage_collection_deletes_nothing_that_is_in_use(self, store: Store) -> None:
        """Garbage collection keeps what readers can reach, and runs that may be being written."""
        summary = publish_random_entry(store)
        publish_random_entry(store, fingerprint="e" * 64)
        publish_random_entry(store, seed=1, fingerprint="e" * 64, replace=True)
        draft = Draft(store)
        write_random_arrays(draft)
        result = collect_garbage(store, delete_replaced_now=True)
        assert [garbage.reason for garbage in result.deleted] == ["replaced"]
        assert [garbage.path for garbage in result.retained] == [f"runs/{draft.run_id}"]
        assert summary in store.list_summaries()
        assert [verdict.is_sound for verdict in verify_entries(store)] == [True, True]
        assert [g.path for g in collect_garbage(store, min_age=NO_AGE).deleted] == [f"runs/{draft.run_id}"]

    @pytest.mark.parametrize("object_kind", ["commit", "metadata", "chunk"])
    @pytest.mark.parametrize("fault", ["changed", "missing"])
    def test_damage_is_an_error(self, store: Store, object_kind: str, fault: str) -> None:
        """A changed or missing object is an error that names it, never another number."""
        summary = publish_random_entry(store)
        run = f"runs/{store.read_entry_commit(summary).run}"
        path = {
            "commit": make_commit_path(summary),
            "metadata": f"{run}/train/mean/zarr.json",
            "chunk": f"{run}/train/mean/c/0/0",
        }[object_kind]
        data = read_all_objects(store)[path]
        if fault == "missing":
            obstore.delete(store.objects, [path])
        else:
            middle = len(data) // 2
            obstore.put(store.objects, path, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(DamageError, match=path):
            store.open_entry(summary).read_array("train/mean")
        (verdict,) = verify_entries(store)
        assert not verdict.is_sound
        assert any(path in problem for problem in verdict.problems)

    def test_an_unknown_requirement_is_refused_and_hides_no_other_entry(self, store: Store) -> None:
        """An entry that requires something unknown is refused with advice to upgrade; others are listed."""
        other = publish_random_entry(store, fingerprint="e" * 64)
        summary = publish_random_entry(store)
        rewrite_commit_with_valid_digests(
            store, summary, lambda content: content["schema"].update(requires=["future"])
        )
        summaries, reasons = store.list_summaries_and_problems()
        assert summaries == [other]
        assert len(reasons) == 1
        assert "future" in reasons[0]
        assert "upgrade" in reasons[0]
        with pytest.raises(UpgradeNeededError):
            store.open_entry(summary)

    def test_a_newer_minor_version_is_read_and_preserved_by_copy(self, store: Store) -> None:
        """An entry of a newer minor version is read; copying preserves arrays and fields that are unknown."""
        publish_random_entry(store)
        (old,) = store.list_summaries()
        run = f"runs/{store.read_entry_commit(old).run}"
        unknown = {"train/skewness/zarr.json": b'{"made": "later"}', "train/skewness/c/0": bytes(range(99))}

        def add_unknown(content: dict[str, Any]) -> None:
            content["schema"]["minor"] = 7
            content["signature"] = "of a later version"
            content["arrays"]["train/skewness"] = "0" * 64
            for name, data in unknown.items():
                content["objects"][name] = {"size": len(data), "sha256": compute_sha256(data)}

        for name, data in unknown.items():
            obstore.put(store.objects, f"{run}/{name}", data)
        rewrite_commit_with_valid_digests(store, old, add_unknown)
        (summary,) = store.list_summaries()
        assert store.open_entry(summary).read_array("train/count").sum() == TRAIN_SAMPLES
        target = open_or_create_store(MemoryStore())
        assert [result.outcome for result in copy_entries(store, target, [summary])] == ["copied"]
        assert read_all_objects(target) == read_all_objects(store)

    def test_a_copy_is_the_same_entry(self, store: Store) -> None:
        """Entries copied to another store and back have the same bytes; copying them again writes nothing."""
        publish_random_entry(store)
        target, back = open_or_create_store(MemoryStore()), open_or_create_store(MemoryStore())
        assert [r.outcome for r in copy_entries(store, target, store.list_summaries())] == ["copied"]
        assert [r.outcome for r in copy_entries(target, back, target.list_summaries())] == ["copied"]
        assert read_all_objects(back) == read_all_objects(store)
        (result,) = copy_entries(back, store, back.list_summaries())
        assert (result.outcome, result.written_object_count) == ("already there", 0)

    def test_listing_reads_no_run(self, store: Store) -> None:
        """Listing reads commits only: it succeeds when all runs are gone."""
        summary = publish_random_entry(store)
        obstore.delete(store.objects, [path for path in read_all_objects(store) if path.startswith("runs/")])
        assert store.list_summaries_and_problems() == ([summary], [])


def make_backbone_card(spec: str = "lite0", image_size: int = 96, weights_text: str = "w") -> BackboneCard:
    """Return a card of a backbone that need not exist."""
    return BackboneCard(
        spec=spec,
        model=f"timm_{spec}",
        rule="pre-logits",
        weights=hashlib.sha256(weights_text.encode()).hexdigest(),
        preprocessing=Preprocessing(
            input_size=image_size,
            resize=image_size,
            resampling="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        features=FEATURES,
    )


def write_random_arrays(draft: Draft, seed: int = 0) -> Arrays:
    """Write a few arrays of random numbers to a draft, and return them."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {
        "train/count": 1 + rng.multinomial(TRAIN_SAMPLES - CLASSES, np.full(CLASSES, 1 / CLASSES)),
        "train/mean": rng.standard_normal((CLASSES, FEATURES)),
        "train/centre_2": rng.standard_normal((CLASSES, 2, FEATURES)).astype(np.float32),
        "test/feature": rng.standard_normal((TEST_SAMPLES, FEATURES)).astype(np.float16),
        "test/label": rng.integers(0, CLASSES, TEST_SAMPLES).astype(np.int32),
    }
    for name, array in arrays.items():
        draft.write_array(name, array)
    return arrays


def publish_with_placeholder_cards(
    draft: Draft,
    *,
    dataset: str = "toy",
    backbone: BackboneCard | None = None,
    fingerprint: str = "f" * 64,
    role: Literal["full", "tuning"] = "full",
    options: dict[str, Any] | None = None,
    leaves: list[str] | None = None,
    test_samples: int = TEST_SAMPLES,
    replace: bool = False,
) -> PublishResult:
    """Publish a draft of random arrays with plausible cards."""
    ids = [f"n{i}" for i in range(CLASSES)]
    return publish_draft(
        draft,
        backbone or make_backbone_card(),
        DatasetCard(
            name=dataset,
            class_ids=ids,
            class_names=ids,
            train_samples=TRAIN_SAMPLES,
            test_samples=test_samples,
            fingerprint=fingerprint,
            leaves=leaves or [fingerprint],
        ),
        ExtractionCard(
            options={"seed": 0} if options is None else options,
            role=role,
            versions={},
            device="cpu",
            threads=1,
            seconds=1.0,
            images_per_second=20.0,
        ),
        CLASSIFIER,
        replace=replace,
    )


def publish_random_entry(store: Store, seed: int = 0, **cards: Any) -> Summary:
    """Publish random arrays with :func:`publish_with_placeholder_cards`, and return the summary."""
    draft = Draft(store)
    write_random_arrays(draft, seed)
    return publish_with_placeholder_cards(draft, **cards).summary


def read_all_objects(store: Store) -> dict[str, bytes]:
    """Return the bytes of all objects of a store, by path."""
    paths = [item["path"] for batch in obstore.list(store.objects) for item in batch]
    with ThreadPoolExecutor(16) as pool:
        contents = pool.map(lambda path: bytes(obstore.get(store.objects, path).bytes()), paths)
        return dict(zip(paths, contents, strict=True))


def list_run_ids(store: Store) -> set[str]:
    """Return the ids of the runs that have any object."""
    paths = [item["path"] for batch in obstore.list(store.objects, prefix="runs") for item in batch]
    return {path.split("/")[1] for path in paths} - {"zarr.json"}


def rewrite_commit_with_valid_digests(
    store: Store, summary: Summary, change_in_place: Callable[[dict[str, Any]], object]
) -> None:
    """Change the content of a commit in place, with valid digests, as another program could write it."""
    path = make_commit_path(summary)
    content = json.loads(bytes(obstore.get(store.objects, path).bytes()))["commit"]
    change_in_place(content)
    key = (summary.backbone_hash, summary.fingerprint, summary.options)
    content["summary"]["entry_digest"] = compute_entry_digest(content["arrays"], *key)
    obstore.put(store.objects, path, encode_commit_with_digest(content))
