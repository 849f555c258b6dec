"""The pass over the images: kinds of sources, numbers of threads, damaged images; dry runs."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from sfm.backbones.build import load_backbone
from sfm.errors import InputError
from sfm.pipeline import extract as extract_module
from sfm.pipeline import partition_tasks
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.decoding import DecodedBatch, DecodingOptions, SampleBatch
from sfm.pipeline.dry_run import estimate_extraction
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import find_unstaged_backbones_unless_complete, stage_tasks
from sfm.pipeline.fingerprint import FingerprintBuilder, digest_sample
from sfm.pipeline.flow_agreement import compute_flow_cosine
from sfm.pipeline.partition_tasks import make_tasks
from sfm.pipeline.runtime import (
    ExtractionRuntime,
    choose_forward_batch_size,
    compute_pixel_features,
    extraction_runtime,
    optimize_for_inference,
    pad_batch_to_power_of_two,
)
from sfm.pipeline.selection import select_samples_if_labels_known
from sfm.pipeline.sources import SOURCE_KINDS, Sample, Shard, Source, Split, open_source
from sfm.pipeline.sources.class_subsets import (
    select_source_classes,
    select_split_rows,
    take_ascending_positions,
)
from sfm.pipeline.sources.folder import open_folder_source
from sfm.pipeline.sources.sample import SampleFile
from sfm.pipeline.staging import Staging, open_staging_and_delete_on_success, try_lock_staging
from sfm.stats_store.entry_selection import select_only_summary
from sfm.stats_store.store import Entry, open_store


def make_config(store: Path | str, source: str, **changes: object) -> ExtractConfig:
    values: dict[str, object] = {
        "source": source,
        "store": str(store),
        "name": "garments",
        "backbone": ["lite0"],
        "image_size": 32,
        "sub_classes": (2,),
    }
    return ExtractConfig(**(values | changes))


def open_entry(url: Path) -> Entry:
    store = open_store(str(url))
    return store.open_entry(select_only_summary(store.list_summaries(), dataset="garments"))


def make_stream_source(source: Source, size: int = 7) -> Source:
    """The same samples, shuffled, as shards that tell nothing before they are read."""

    def split(known: Split) -> Split:
        order = np.random.default_rng(0).permutation(len(known.labels))

        def shard(rows: np.ndarray) -> Shard:
            def read(positions: np.ndarray | None) -> Iterator[Sample | SampleFile]:
                samples = (next(known.iter_samples(np.array([row]))) for row in rows)
                return samples if positions is None else take_ascending_positions(samples, positions)

            return Shard(f"shard of {len(rows)}", None, read)

        return Split(
            tuple(shard(order[i : i + size]) for i in range(0, len(order), size)), known.listing_digest
        )

    return dataclasses.replace(
        source, class_ids=None, class_names=None, train=split(source.train), test=split(source.test)
    )


@pytest.fixture
def stream_spec(image_folder, monkeypatch) -> str:
    monkeypatch.setitem(SOURCE_KINDS, "stream", lambda text: make_stream_source(open_folder_source(text)))
    return f"stream:{image_folder}"


@pytest.mark.slow
def test_a_stream_has_the_fingerprint_and_statistics_of_the_same_folder(tmp_path, image_folder, stream_spec):
    changes = {"exemplars": 2, "tune_fraction": 0.25}
    extract(make_config(tmp_path / "a", f"folder:{image_folder}", **changes))
    extract(make_config(tmp_path / "b", stream_spec, **changes))
    ours, theirs = open_entry(tmp_path / "b"), open_entry(tmp_path / "a")
    assert ours.dataset.class_ids == ["bag", "boot", "trouser"]
    assert ours.summary.fingerprint == theirs.summary.fingerprint
    np.testing.assert_allclose(
        ours.read_array("train/mean"), theirs.read_array("train/mean"), rtol=1e-4, atol=1e-5
    )
    # The nearest to the mean is the same image, though it lies elsewhere.
    nearest = ours.read_array("exemplar/image")[:, 0], theirs.read_array("exemplar/image")[:, 0]
    np.testing.assert_array_equal(*nearest)


def test_limit_per_class_takes_the_first_samples_of_each_class_of_a_stream(
    tmp_path, image_folder, stream_spec
):
    extract(make_config(tmp_path / "s", stream_spec, limit_per_class=3))
    entry = open_entry(tmp_path / "s")
    assert entry.read_array("train/count").tolist() == [3, 3, 3]
    builder, source = FingerprintBuilder(), make_stream_source(open_folder_source(str(image_folder)))
    for name, split in source.splits.items():
        own = [sample.read() for shard in split.shards for sample in shard.read(None)]
        for c, class_id in enumerate(entry.dataset.class_ids):
            for sample in [sample for sample in own if sample.class_id == class_id][:3]:
                digest = np.frombuffer(digest_sample(sample.data), dtype=np.uint8)[None]
                builder.add_samples(name, entry.dataset.class_ids, np.array([c], dtype=np.int32), digest)
    assert entry.summary.fingerprint == builder.compute_fingerprint()


def test_a_stream_with_different_classes_per_split_is_refused(tmp_path, image_folder, monkeypatch):
    def lopsided(text: str) -> Source:
        source = open_folder_source(text)
        rows = np.flatnonzero(source.test.labels != 1)
        test = select_split_rows(source.test, rows, source.test.labels[rows], "less")
        return make_stream_source(dataclasses.replace(source, test=test))

    monkeypatch.setitem(SOURCE_KINDS, "lopsided", lopsided)
    with pytest.raises(InputError, match="hold different classes: boot in one only"):
        extract(make_config(tmp_path / "s", f"lopsided:{image_folder}"))


def test_class_names_that_differ_only_in_spelling_are_refused(image_folder):
    for split in ("train", "test"):
        (image_folder / split / "boot").rename(image_folder / split / "Bag")
    with pytest.raises(InputError, match="'Bag' and 'bag', the same but for how they are written"):
        open_source(f"folder:{image_folder}")


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_classes_are_selected_by_id_from_any_kind_of_source(tmp_path, image_folder, monkeypatch, kind):
    def opened(text: str) -> Source:
        source = open_folder_source(text)
        return select_source_classes(
            make_stream_source(source) if kind == "stream" else source, ["trouser", "bag"]
        )

    monkeypatch.setitem(SOURCE_KINDS, "chosen", opened)
    extract(make_config(tmp_path / "s", f"chosen:{image_folder}", exemplars=1))
    entry = open_entry(tmp_path / "s")
    assert entry.dataset.class_ids == ["bag", "trouser"]
    assert entry.read_array("train/count").tolist() == [12, 12]


def test_selecting_a_missing_class_is_refused(image_folder):
    with pytest.raises(InputError, match="has no class boots: did you mean boot"):
        select_source_classes(open_folder_source(str(image_folder)), ["bag", "boots"])


def test_small_classes_of_a_stream_are_dropped_after_the_pass(tmp_path, image_folder, stream_spec):
    for file in sorted((image_folder / "train" / "boot").iterdir())[5:]:
        file.unlink()
    with pytest.raises(InputError, match=r"fewer than 6 training images: boot \(5\)"):
        extract(make_config(tmp_path / "s", stream_spec, min_count=6))
    extract(make_config(tmp_path / "s", stream_spec, min_count=6, small_classes="drop"))
    entry = open_entry(tmp_path / "s")
    assert entry.dataset.class_ids == ["bag", "trouser"]
    assert entry.dataset.train_samples == 24
    assert len(entry.read_array("test/label")) == 16


@pytest.fixture
def single_thread_runtime(image_folder) -> Iterator[ExtractionRuntime]:
    with extraction_runtime(open_folder_source(str(image_folder)), "cpu", 1) as runtime:
        yield runtime


def damage_images(image_folder: Path, *names: str) -> None:
    for name in names:
        file = image_folder / name
        file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_skipped_images_are_listed_and_repeating_without_skip_fails(
    tmp_path, image_folder, stream_spec, kind
):
    names = ("train/boot/003.png", "test/bag/001.png")
    damage_images(image_folder, *names)
    source = stream_spec if kind == "stream" else f"folder:{image_folder}"
    done = extract(make_config(tmp_path / "s", source, on_error="skip", exemplars=2))
    assert len(done.skipped) == 2
    assert all(any(name in line for line in done.skipped) for name in names)
    entry = open_entry(tmp_path / "s")
    assert entry.extraction.skipped == done.skipped
    assert entry.read_array("train/count").tolist() == [12, 11, 12]
    assert len(entry.read_array("test/label")) == 23
    again = extract(make_config(tmp_path / "s", source, on_error="skip", exemplars=2))
    assert again.pass_summary.images_read == 0
    assert again.skipped == done.skipped
    with pytest.raises(InputError, match=r"cannot decode .* leave out what cannot be decoded with"):
        extract(make_config(tmp_path / "s", source, exemplars=2))


def test_skipped_images_do_not_enter_the_fingerprint(tmp_path, image_folder):
    damage_images(image_folder, "train/boot/011.png")
    with_broken = extract(make_config(tmp_path / "a", f"folder:{image_folder}", on_error="skip")).published[0]
    (image_folder / "train/boot/011.png").unlink()
    without = extract(make_config(tmp_path / "b", f"folder:{image_folder}")).published[0]
    assert with_broken.summary.fingerprint == without.summary.fingerprint
    assert with_broken.summary.options == without.summary.options


def test_a_class_without_decodable_images_is_refused(tmp_path, image_folder):
    damage_images(image_folder, *(f"test/boot/{i:03d}.png" for i in range(8)))
    with pytest.raises(InputError, match="no test images in class boot once the 8 unreadable ones are"):
        extract(make_config(tmp_path / "s", f"folder:{image_folder}", on_error="skip"))
    assert open_store(str(tmp_path / "s")).list_summaries() == []


def stage_source(root: Path, source: Source, runtime: ExtractionRuntime) -> dict[str, bytes]:
    root.mkdir()
    selection = select_samples_if_labels_known(
        make_config("s", "builtin:fashion-mnist-6k", limit_per_class=20), source
    )
    before = torch.get_num_threads()
    torch.set_num_threads(runtime.max_batches_in_flight)
    try:
        backbones = optimize_for_inference([load_backbone("lite0", image_size=32)], "float32")
    finally:
        torch.set_num_threads(before)
    steps = stage_tasks(
        source, make_tasks(source, selection), backbones, Staging(root), PassOptions(), runtime
    )
    assert sum(step.image_count for step in steps) == 400
    return {str(file.relative_to(root)): file.read_bytes() for file in root.glob("*/*")}


def test_staged_files_are_bit_for_bit_independent_of_threads_and_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(partition_tasks, "MAX_TASK_ROWS", 90)
    source, found = open_source("builtin:fashion-mnist-6k"), []
    for device, cores in (("cpu", 1), ("cpu", 3), ("cuda", 1)):
        with extraction_runtime(source, device, cores) as runtime:
            found.append(stage_source(tmp_path / f"{device}-{cores}", source, runtime))
    assert len(found[0]) == 4 * 6
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_decoding_processes_read_files_themselves_and_the_entry_is_the_same(
    tmp_path, image_folder, stream_spec, kind, some, monkeypatch
):
    damage_images(image_folder, "train/boot/003.png")
    source = stream_spec if kind == "stream" else f"folder:{image_folder}"
    if some:
        (tmp_path / "some.txt").write_text("boot\ntrouser\n")
        source += f"?classes={tmp_path / 'some.txt'}"
    here = extract(make_config(tmp_path / "here", source, on_error="skip"))

    def refused(file: SampleFile) -> Sample:
        raise AssertionError(f"{file.location} is read here")

    monkeypatch.setattr(SampleFile, "read", refused)
    monkeypatch.setattr(
        extract_module,
        "extraction_runtime",
        lambda source, _, count: extraction_runtime(source, "cuda", count),
    )
    there = extract(make_config(tmp_path / "there", source, on_error="skip"))
    digests = {done.published[0].summary.entry_digest for done in (here, there)}
    assert len(digests) == 1
    assert there.skipped == here.skipped
    assert len(here.skipped) == 1


def test_without_decoding_processes_files_are_read_before_decoding(
    tmp_path, image_folder, single_thread_runtime
):
    taken: list[Sample | SampleFile] = []

    def decode_batch(batch: SampleBatch, options: DecodingOptions) -> AbstractContextManager[DecodedBatch]:
        taken.extend(sample for _, sample in batch)
        return single_thread_runtime.decode_batch(batch, options)

    source = open_folder_source(str(image_folder))
    watched = dataclasses.replace(single_thread_runtime, decode_batch=decode_batch)
    tasks = make_tasks(
        source, select_samples_if_labels_known(make_config("s", f"folder:{image_folder}"), source)
    )
    list(
        stage_tasks(
            source, tasks, [load_backbone("lite0", image_size=32)], Staging(tmp_path), PassOptions(), watched
        )
    )
    assert len(taken) == 60
    assert all(isinstance(sample, Sample) for sample in taken)


@pytest.mark.parametrize("size", [32, 160])
def test_inference_optimisation_keeps_features_up_to_rounding(size):
    backbone = load_backbone("lite0", image_size=size, device="cpu")
    (quick,) = optimize_for_inference([backbone], "float32")
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, found = backbone.features(images), quick.features(images)
    assert quick.model is not backbone.model
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert quick.card == backbone.card
    assert optimize_for_inference([backbone], "bf16") == [backbone]


@pytest.mark.parametrize(("count", "whole"), [(1, 1), (5, 8), (8, 8), (77, 128)])
def test_gpu_batches_are_padded_to_a_power_of_two(count, whole):
    images = torch.rand(count, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    found = pad_batch_to_power_of_two(images)
    assert found.shape == (whole, 3, 4, 5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[:count], images)
    assert not found[count:].any()


def test_large_images_are_batched_in_order():
    small, large = (load_backbone("lite0", image_size=size, device="cpu") for size in (32, 160))
    assert choose_forward_batch_size(small) > choose_forward_batch_size(large)
    pixels = np.random.default_rng(0).integers(
        256, size=(choose_forward_batch_size(large) + 3, 160, 160, 3), dtype=np.uint8
    )
    seen = []
    large.model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = compute_pixel_features(large, pixels)
    assert seen == [choose_forward_batch_size(large), 3]
    alone = np.concatenate([compute_pixel_features(large, image[None]) for image in pixels])
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_a_source_that_shrinks_while_being_read_is_named_in_the_error(tmp_path):
    source = open_source("builtin:fashion-mnist-6k")
    (whole,) = source.test.shards
    short = Shard(whole.location, whole.labels, lambda rows: whole.read(rows[:-1]))
    shrunk = dataclasses.replace(source, test=dataclasses.replace(source.test, shards=(short,)))
    selection = select_samples_if_labels_known(
        make_config("s", "builtin:fashion-mnist-6k", limit_per_class=2), shrunk
    )
    tasks = [task for task in make_tasks(shrunk, selection) if task.split == "test"]
    backbone = load_backbone("lite0", image_size=32)
    problem = "shrank while it was read: 19 of 20 samples of partition test"
    with extraction_runtime(shrunk, "cpu", 1) as runtime, pytest.raises(InputError, match=problem):
        list(stage_tasks(shrunk, tasks, [backbone], Staging(tmp_path), PassOptions(), runtime))
    assert find_unstaged_backbones_unless_complete(
        tasks[0], [backbone], Staging(tmp_path), PassOptions()
    ) == [backbone]


def test_images_that_changed_between_two_runs_are_refused(tmp_path, image_folder, single_thread_runtime):
    backbones = [load_backbone(spec, image_size=32) for spec in ("lite0", "lite1")]
    source, staging = open_folder_source(str(image_folder)), Staging(tmp_path)
    tasks = make_tasks(
        source, select_samples_if_labels_known(make_config("s", f"folder:{image_folder}"), source)
    )
    list(stage_tasks(source, tasks, backbones[:1], staging, PassOptions(), single_thread_runtime))
    first, second = image_folder / "train/bag/000.png", image_folder / "train/bag/001.png"
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match="changed between two runs"):
        list(stage_tasks(source, tasks, backbones, staging, PassOptions(), single_thread_runtime))
    # What was staged of them is forgotten, so that the next run reads them anew.
    assert find_unstaged_backbones_unless_complete(tasks[0], backbones, staging, PassOptions()) == backbones


def test_damaged_staged_files_are_recomputed(tmp_path, image_folder, single_thread_runtime):
    backbone = load_backbone("lite0", image_size=32)
    source, staging = open_folder_source(str(image_folder)), Staging(tmp_path)
    tasks = make_tasks(
        source, select_samples_if_labels_known(make_config("s", f"folder:{image_folder}"), source)
    )
    list(stage_tasks(source, tasks, [backbone], staging, PassOptions(), single_thread_runtime))
    files = sorted(file for file in tmp_path.glob(f"*/{tasks[0].name}.*"))
    sound = {file: file.read_bytes() for file in files}
    assert len(files) == 4
    assert find_unstaged_backbones_unless_complete(tasks[0], [backbone], staging, PassOptions()) is None
    for file in files:
        for damaged in (b"", sound[file][:-1], sound[file] + b" 1", b"[" * 100_000):
            file.write_bytes(damaged)
            assert (
                find_unstaged_backbones_unless_complete(tasks[0], [backbone], staging, PassOptions())
                is not None
            )
            list(stage_tasks(source, tasks, [backbone], staging, PassOptions(), single_thread_runtime))
            assert {file: file.read_bytes() for file in files} == sound


def test_bf16_publishes_another_variant_with_almost_the_same_flow(tmp_path, image_folder):
    source = f"folder:{image_folder}"
    exact = extract(make_config(tmp_path / "a", source)).published[0]
    mixed = extract(make_config(tmp_path / "b", source, precision="bf16")).published[0]
    assert mixed.summary.options != exact.summary.options
    flows = []
    for url in ("a", "b"):
        mean = open_entry(tmp_path / url).read_array("train/mean")
        flows.append((mean.mean(axis=0) - mean).ravel())
    cosine = flows[0] @ flows[1] / np.linalg.norm(flows[0]) / np.linalg.norm(flows[1])
    assert 0.99 < cosine < 1
    # So few images are all looked at to tell what the precision does.
    assert open_entry(tmp_path / "b").extraction.flow_cosine == pytest.approx(cosine, abs=1e-6)
    assert open_entry(tmp_path / "a").extraction.flow_cosine is None


def test_the_flow_cosine_compares_flows_between_class_means():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 9, 5)).astype(np.float32)
    labels = ["a", "b", "b", "c", "a", "c", "c", "c", "c"]
    means = [np.stack([f[[x == c for x in labels]].mean(0) for c in "abc"]) for f in (one, other)]
    flows = [((m.sum(0) - m) / 2 - m).ravel() for m in means]
    wanted = flows[0] @ flows[1] / np.linalg.norm(flows[0]) / np.linalg.norm(flows[1])
    assert compute_flow_cosine(one, other, labels) == pytest.approx(wanted, abs=1e-6)
    assert compute_flow_cosine(one, one + 3, labels) == pytest.approx(1, abs=1e-6)
    assert compute_flow_cosine(one, one, ["a"] * 9) is None
    assert compute_flow_cosine(0 * one, one, labels) is None


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_a_dry_run_counts_and_estimates_and_writes_nothing(tmp_path, image_folder, stream_spec, kind):
    damage_images(image_folder, "train/boot/003.png")
    source = stream_spec if kind == "stream" else f"folder:{image_folder}"
    planned = estimate_extraction(
        make_config(tmp_path / "s", source, backbone=["lite0", "lite1"], tune_fraction=0.5)
    )
    assert planned.counted == (kind == "folder")
    assert planned.classes == (3 if planned.counted else None)
    # Of a stream, the first shard tells: six shards of seven, and four.
    assert planned.samples == ({"train": 36, "test": 24} if planned.counted else {"train": 42, "test": 28})
    assert [b.backbone for b in planned.backbones] == ["lite0", "lite1"]
    assert planned.entries == 4
    assert planned.undecodable == 1
    assert planned.images_per_second > 0
    assert not (tmp_path / "s").exists()


def test_a_locked_staging_folder_is_reused_once_its_holder_exits(tmp_path):
    entered = threading.Event()

    def dying() -> None:
        with try_lock_staging(tmp_path / "key.lock") as mine:
            assert mine
            entered.set()
            time.sleep(0.3)

    holder = threading.Thread(target=dying)
    holder.start()
    entered.wait()
    with open_staging_and_delete_on_success(tmp_path, "key") as staging:
        assert staging.root.name == "key"
    holder.join()
