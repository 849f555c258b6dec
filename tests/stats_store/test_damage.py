"""Whatever happens to the bytes of a store: it is harmless, or it is reported by name; no other numbers."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from toy_entries import make_backbone_card, publish_with_placeholder_cards, write_random_arrays

from sfm.errors import DamageError, InputError
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries


@dataclass(frozen=True)
class Content:
    """Everything a reader gets of an entry: numbers and cards."""

    cards: str
    arrays: dict[str, np.ndarray]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Content)
            and self.cards == other.cards
            and self.arrays.keys() == other.arrays.keys()
            and all(np.array_equal(a, other.arrays[name], equal_nan=True) for name, a in self.arrays.items())
        )


@dataclass(frozen=True)
class StoreReading:
    """What a reader gets from a store: contents by fingerprint, and complaints."""

    contents: dict[str, Content]
    complaints: list[str]


def read_all(url: str) -> StoreReading:
    """Read a store as a user would, entry by entry."""
    try:
        store = open_store(url)
        summaries, complaints = store.list_summaries_and_problems()
    except (DamageError, InputError) as error:
        return StoreReading({}, [str(error)])
    contents = {}
    for summary in summaries:
        try:
            entry = store.open_entry(summary)
            cards = [summary, entry.backbone, entry.dataset, entry.extraction, entry.classifier]
            text = json.dumps([card.model_dump(mode="json") for card in cards])
            contents[summary.fingerprint] = Content(
                text, {name: entry.read_array(name) for name in entry.list_array_names()}
            )
        except (DamageError, InputError) as error:
            complaints.append(str(error))
    return StoreReading(contents, complaints)


@pytest.fixture(scope="module")
def original_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two entries of different data through different backbones."""
    store = open_or_create_store(str(tmp_path_factory.mktemp("original")))
    for seed, weights in ((1, "w"), (2, "v")):
        draft = Draft(store)
        write_random_arrays(draft, seed)
        publish_with_placeholder_cards(
            draft, fingerprint=f"{seed:064x}", backbone=make_backbone_card(weights_text=weights)
        )
    return Path(store.url)


@pytest.fixture
def store(original_store: Path, tmp_path: Path) -> Store:
    """A copy of that store, to be damaged."""
    return open_store(str(shutil.copytree(original_store, tmp_path / "store")))


@pytest.fixture
def expected_reading(store: Store) -> StoreReading:
    """What the store holds before anything happens to it."""
    reading = read_all(store.url)
    assert len(reading.contents) == 2
    assert not reading.complaints
    return reading


def list_files(store: Store, *, chunks: bool | None = None) -> list[Path]:
    """Return the files of a store; only chunks, only others, or all."""
    files = sorted(path for path in Path(store.url).rglob("*") if path.is_file() and path.stat().st_size)
    return [f for f in files if chunks is None or ("c" in f.relative_to(store.url).parts[3:]) == chunks]


@contextmanager
def change_file(store: Store, file: Path, data: bytes | None) -> Iterator[str]:
    """Change a file for a while; yields its path in the store. None deletes it."""
    before = file.read_bytes()
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    try:
        yield file.relative_to(store.url).as_posix()
    finally:
        file.write_bytes(before)


def check_damage_report(store: Store, expected_reading: StoreReading, path: str) -> bool:
    """Check the promise after a change of one object; return whether the change was reported.

    Entries that can be read are what they were, an entry that cannot be is reported with the path of the
    object, and ``verify_entries`` finds exactly what the reader found.
    """
    reading = read_all(store.url)
    for fingerprint, content in reading.contents.items():
        assert content == expected_reading.contents[fingerprint], f"other content after a change of {path}"
    named = [c for c in reading.complaints if path in c or (path == "zarr.json" and store.url in c)]
    assert len(reading.contents) + len(named) == 2 or (path == "zarr.json" and named)
    assert named == reading.complaints
    if path != "zarr.json":
        problems = [problem for verdict in verify_entries(store) for problem in verdict.problems]
        assert bool(problems) == bool(named), path
        assert all(path in problem for problem in problems)
    return bool(named)


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=pytest.mark.torture)])
def test_bit_flip_in_any_object_is_harmless_or_reported_with_its_path(
    store: Store, expected_reading: StoreReading, flips: int
) -> None:
    rng = random.Random(flips)
    files = list_files(store)
    reported, objects = 0, set()
    for number in range(flips):
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        with change_file(store, file, bytes(data)) as path:
            reported += check_damage_report(store, expected_reading, path)
        objects.add(path)
    assert reported > flips // 2
    assert read_all(store.url) == expected_reading
    print(
        f"\ntorture: {flips} bits flipped in {len(objects)} objects: {reported} reported by name, "
        f"{flips - reported} harmless, none gave other numbers"
    )


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize(
    "change",
    [
        "deleted",
        "cut by a byte",
        *(
            pytest.param(name, marks=pytest.mark.torture)
            for name in ("emptied", "cut in half", "longer", "zeros")
        ),
    ],
)
def test_deleted_or_truncated_object_is_reported_with_its_path(
    store: Store, expected_reading: StoreReading, change: str
) -> None:
    for file in list_files(store):
        with change_file(store, file, CHANGES[change](file.read_bytes())) as path:
            if path == "runs/zarr.json" or path.endswith(("/train/zarr.json", "/test/zarr.json")):
                check_damage_report(store, expected_reading, path)
            else:
                assert check_damage_report(store, expected_reading, path), (
                    f"{path} {change}, and nobody says so"
                )


def test_swapped_chunks_are_both_reported(store: Store, expected_reading: StoreReading) -> None:
    chunks = list_files(store, chunks=True)
    pairs = [(a, b) for a in chunks for b in chunks if a < b and a.parent.parent == b.parent.parent]
    assert pairs
    for one, other in [*pairs, (chunks[0], chunks[-1])]:
        was, wanted = one.read_bytes(), other.read_bytes()
        with change_file(store, one, wanted) as first, change_file(store, other, was) as second:
            reading = read_all(store.url)
            assert all(content == expected_reading.contents[f] for f, content in reading.contents.items())
            assert any(first in c or second in c for c in reading.complaints)
            problems = [p for verdict in verify_entries(store) for p in verdict.problems]
            assert any(first in p for p in problems)
            assert any(second in p for p in problems)


def test_metadata_or_commit_copied_from_another_entry_is_reported(
    store: Store, expected_reading: StoreReading
) -> None:
    commits = [f for f in list_files(store) if "index" in f.relative_to(store.url).parts]
    runs = [store.read_commit(f.relative_to(store.url).as_posix()).run for f in commits]
    for ours, theirs in ((0, 1), (1, 0)):
        with change_file(store, commits[ours], commits[theirs].read_bytes()) as path:
            assert check_damage_report(store, expected_reading, path)
        root = Path(store.url) / "runs" / runs[ours]
        for file in root.rglob("zarr.json"):
            twin = Path(store.url) / "runs" / runs[theirs] / file.relative_to(root)
            if file.read_bytes() != twin.read_bytes():
                with change_file(store, file, twin.read_bytes()) as path:
                    assert check_damage_report(store, expected_reading, path)


def test_swapped_runs_are_reported(store: Store, expected_reading: StoreReading) -> None:
    runs = sorted(p for p in (Path(store.url) / "runs").iterdir() if p.is_dir())
    aside = runs[0].with_name("aside")
    runs[0].rename(aside)
    runs[1].rename(runs[0])
    aside.rename(runs[1])
    reading = read_all(store.url)
    assert not reading.contents
    assert len(reading.complaints) == 2
    assert all(not verdict.is_sound for verdict in verify_entries(store))


def test_newest_commit_overwritten_with_an_older_one_is_reported(store: Store) -> None:
    draft = Draft(store)
    write_random_arrays(draft, 3)
    summary = publish_with_placeholder_cards(draft, fingerprint=f"{1:064x}", replace=True).summary
    newest, older = (Path(store.url) / "index" / summary.key / f"{n:08d}.json" for n in (2, 1))
    with change_file(store, newest, older.read_bytes()) as path:
        entries, reasons = store.list_summaries_and_problems()
        assert [s.fingerprint for s in entries] == [f"{2:064x}"]
        assert path in reasons[0]


def test_lost_commit_does_not_restore_a_replaced_or_removed_entry(store: Store) -> None:
    draft = Draft(store)
    write_random_arrays(draft, 3)
    summary = publish_with_placeholder_cards(draft, fingerprint=f"{1:064x}", replace=True).summary
    newest = Path(store.url) / "index" / summary.key / "00000002.json"
    with change_file(store, newest, None) as path:
        entries, reasons = store.list_summaries_and_problems()
        assert [s.fingerprint for s in entries] == [f"{2:064x}"]
        (reason,) = reasons
        assert reason.startswith(f"missing commit {path}: it was published and is gone; if it never was, ")
        assert reasons[0] in [problem for verdict in verify_entries(store) for problem in verdict.problems]
    remove_entry(store, summary)
    with change_file(store, newest.with_name("00000003.json"), None) as path:
        entries, reasons = store.list_summaries_and_problems()
        assert [s.fingerprint for s in entries] == [f"{2:064x}"]
        assert path in reasons[0]


def test_damaged_newest_commit_does_not_fall_back_to_the_previous_generation(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    draft = Draft(store)
    write_random_arrays(draft, 3)
    summary = publish_with_placeholder_cards(draft, fingerprint=f"{1:064x}", replace=True).summary
    newest = Path(store.url) / "index" / summary.key / "00000002.json"
    with change_file(store, newest, b"{}") as path:
        assert [s.fingerprint for s in store.list_summaries()] == [f"{2:064x}"]
        assert path in caplog.text
        with pytest.raises(DamageError, match="damaged commit"):
            store.open_entry(summary)


def test_replace_publishes_the_next_generation_after_a_damaged_commit(store: Store) -> None:
    summary = store.list_summaries()[0]
    broken = Path(store.url) / "index" / summary.key / "00000001.json"
    broken.write_bytes(b"")

    def again(*, replace: bool) -> Callable[[], object]:
        draft = Draft(store)
        write_random_arrays(draft, 5)
        weights = next(w for w in "wv" if make_backbone_card(weights_text=w).hash == summary.backbone_hash)
        return lambda: publish_with_placeholder_cards(
            draft,
            fingerprint=summary.fingerprint,
            backbone=make_backbone_card(weights_text=weights),
            replace=replace,
        )

    with pytest.raises(DamageError, match="--replace publishes the next generation"):
        again(replace=False)()
    again(replace=True)()
    assert {s.generation for s in store.list_summaries()} == {1, 2}


def test_plain_zarr_reader_raises_on_a_chunk_checksum_mismatch(store: Store) -> None:
    rng = random.Random(0)
    for file in list_files(store, chunks=True):
        parts = file.relative_to(store.url).parts
        array = Path(*parts[: parts.index("c")])
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with change_file(store, file, bytes(data)), pytest.raises(ValueError, match="checksum"):
            zarr.open_array(Path(store.url) / array, mode="r")[...]
        zarr.open_array(Path(store.url) / array, mode="r")[...]


def test_publish_raises_damage_error_if_a_written_object_is_missing_or_changed(tmp_path: Path) -> None:
    store = open_or_create_store(str(tmp_path))
    for change in (None, b"other bytes"):
        draft = Draft(store)
        write_random_arrays(draft, 1)
        victim = tmp_path / "runs" / draft.run_id / "train" / "mean" / "c" / "0" / "0"
        if change is None:
            victim.unlink()
        else:
            victim.write_bytes(change)
        with pytest.raises(DamageError, match=r"nothing was published: .* object runs/.*/train/mean/c/0/0"):
            publish_with_placeholder_cards(draft)
        assert store.list_summaries() == []
        draft.discard()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["zarr.json"]
