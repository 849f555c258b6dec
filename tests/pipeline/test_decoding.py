"""Processes decode batches as threads do, and end with their parent."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sfm.backbones.build import load_backbone
from sfm.backbones.card import Preprocessing
from sfm.errors import InputError
from sfm.events import Progress
from sfm.pipeline import dask_worker, partition_tasks
from sfm.pipeline import extract as extract_module
from sfm.pipeline.batch_features import PassOptions
from sfm.pipeline.decoding import DecodingOptions, decode_batch
from sfm.pipeline.decoding_processes import (
    CHUNK_IMAGES,
    decoding_process_pool,
    split_into_chunks_by_first_index,
)
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.feature_pass import find_unstaged_backbones_unless_complete, stage_tasks
from sfm.pipeline.partition_tasks import PartitionTask, make_tasks
from sfm.pipeline.runtime import ExtractionRuntime, extraction_runtime, optimize_for_inference
from sfm.pipeline.selection import select_samples_if_labels_known
from sfm.pipeline.sources import Source, open_source
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.sample import Sample, SampleFile
from sfm.pipeline.staging import IncompleteExtractionError, Staging

SMALL, LARGE = (
    Preprocessing(input_size=size, resize=size + 8, resampling="bicubic", mean=(0.5,) * 3, std=(0.2,) * 3)
    for size in (24, 40)
)
SQUASHED, BORDERED = (SMALL.model_copy(update={"crop_mode": mode}) for mode in ("squash", "border"))


def make_batch(count: int, broken: tuple[int, ...] = (), first: int = 0) -> list[tuple[int, Sample]]:
    rng = np.random.default_rng(first)
    found = []
    for place in range(first, first + count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(50, 60, 3), dtype=np.uint8)).save(file, "PNG")
        data = file.getvalue()[: 60 if place in broken else None]
        found.append((place, Sample(data, "bag", f"{place}.png")))
    return found


def list_decoding_processes() -> list[psutil.Process]:
    """Those that decode; other tests have other children."""
    found = []
    for each in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [each] if "sfm.pipeline.decoding_processes" in " ".join(each.cmdline()) else []
    return found


@pytest.mark.parametrize(
    "wanted",
    [DecodingOptions((SMALL,)), DecodingOptions((SMALL, LARGE, SQUASHED, BORDERED), views=2, seed=3)],
)
def test_decoding_processes_match_decoding_in_the_caller(wanted):
    with decoding_process_pool(decode_image, 2, 1) as decoding:
        # More and larger batches need more memory than the first, and are decoded in parts.
        for count, first in ((3, 0), (2 * CHUNK_IMAGES + 1, 10), (2, 90)):
            batch = make_batch(count, first=first)
            here = decode_batch(batch, decode_image, wanted)
            with decoding(batch, wanted) as there:
                assert (
                    there.kept_indices_in_task
                    == here.kept_indices_in_task
                    == list(range(first, first + count))
                )
                assert (there.kept_locations, there.encoded_bytes_per_sample, there.skipped) == (
                    here.kept_locations,
                    here.encoded_bytes_per_sample,
                    [],
                )
                np.testing.assert_array_equal(there.sample_digests, here.sample_digests)
                assert list(there.pixels) == list(here.pixels) == list(wanted.preprocessings)
                for preprocessing, pixels in here.pixels.items():
                    assert pixels.shape[:3] == (1 + wanted.views, count, preprocessing.input_size)
                    assert pixels.any(axis=(2, 3, 4)).all()
                    np.testing.assert_array_equal(there.pixels[preprocessing], pixels)


@pytest.mark.parametrize("count", [5, CHUNK_IMAGES, CHUNK_IMAGES + 2])
def test_decoding_processes_skip_or_report_undecodable_images(count):
    batch = make_batch(count, broken=(0, 3, count - 1))
    good = [i for i in range(count) if i not in (0, 3, count - 1)]
    whole = decode_batch([batch[i] for i in good], decode_image, DecodingOptions((SMALL,), views=1))
    with decoding_process_pool(decode_image, 2, 1) as decoding:

        def skip() -> None:
            with decoding(batch, DecodingOptions((SMALL,), views=1, on_error="skip")) as found:
                assert found.kept_indices_in_task == good
                assert [skipped.where for skipped in found.skipped] == ["0.png", "3.png", f"{count - 1}.png"]
                np.testing.assert_array_equal(found.pixels[SMALL], whole.pixels[SMALL])
                np.testing.assert_array_equal(found.sample_digests, whole.sample_digests)

        skip()
        problem = r"cannot decode 0.png: .*--on-error skip"
        with pytest.raises(InputError, match=problem), decoding(batch, DecodingOptions((SMALL,))):
            pass
        # They are as good as before.
        skip()


def test_decoding_processes_read_sample_files(tmp_path):
    batch = make_batch(CHUNK_IMAGES + 3)
    listed = []
    for place, sample in batch:
        file = tmp_path / sample.location
        file.write_bytes(sample.data)
        listed.append((place, SampleFile(str(file), sample.class_id)))
    here = decode_batch(batch, decode_image, DecodingOptions((SMALL,)))
    with decoding_process_pool(decode_image, 2, 1) as decoding:
        with decoding(listed, DecodingOptions((SMALL,))) as there:
            assert (there.kept_indices_in_task, there.encoded_bytes_per_sample) == (
                here.kept_indices_in_task,
                here.encoded_bytes_per_sample,
            )
            assert there.kept_locations == [str(tmp_path / location) for location in here.kept_locations]
            np.testing.assert_array_equal(there.sample_digests, here.sample_digests)
            np.testing.assert_array_equal(there.pixels[SMALL], here.pixels[SMALL])
        # A file that cannot be read is no image that cannot be decoded.
        (tmp_path / "9.png").unlink()
        skip = DecodingOptions((SMALL,), on_error="skip")
        with (
            pytest.raises(InputError, match=r"9.png vanished while the dataset was read"),
            decoding(listed, skip),
        ):
            pass


def test_memory_is_reusable_after_a_reported_failure(tmp_path):
    done = tmp_path / "done"

    def decode(data: bytes) -> Image.Image:
        if data == b"slow":
            time.sleep(1)
            done.touch()
        if data == b"bad":
            raise ValueError("no image")
        return Image.new("RGB", (9, 9))

    data = [b"bad"] + CHUNK_IMAGES * [b""] + [b"slow"]
    batch = [(place, Sample(each, "bag", str(place))) for place, each in enumerate(data)]
    problem = "cannot decode 0: no image"
    with decoding_process_pool(decode, 2, 1) as decoding:
        with pytest.raises(InputError, match=problem), decoding(batch, DecodingOptions((SMALL,))):
            pass
        # The other part was not left behind.
        assert done.exists()


@pytest.mark.parametrize(
    ("count", "min_chunks", "chunks"), [(3, 1, 1), (3, 2, 2), (3, 9, 3), (CHUNK_IMAGES, 1, 1), (128, 1, 4)]
)
def test_a_batch_is_split_into_chunks_of_nearly_equal_size(count, min_chunks, chunks):
    rows = [(place, "bag", str(place), None) for place in range(count)]
    found = split_into_chunks_by_first_index(rows, min_chunks)
    assert [row for chunk in found.values() for row in chunk] == rows
    assert [rows[first] for first in found] == [chunk[0] for chunk in found.values()]
    sizes = [len(chunk) for chunk in found.values()]
    assert len(sizes) == chunks
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= CHUNK_IMAGES


def test_a_batch_without_decodable_images_is_empty():
    with decoding_process_pool(decode_image, 2, 1) as decoding:
        batch = make_batch(3, broken=(0, 1, 2))
        with decoding(batch, DecodingOptions((SMALL,), on_error="skip")) as found:
            assert found.kept_indices_in_task == []
            assert len(found.skipped) == 3
            assert found.pixels[SMALL].shape == (1, 0, 24, 24, 3)


def test_a_decoder_may_be_a_closure_and_imports_the_same_modules(tmp_path, monkeypatch):
    (tmp_path / "colours.py").write_text("RED = (255, 0, 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import colours

    size = (9, 9)
    batch = [(0, Sample(b"", "red", "nowhere"))]
    with (
        decoding_process_pool(lambda _: Image.new("RGB", size, colours.RED), 1, 1) as decoding,
        decoding(batch, DecodingOptions((SMALL,))) as found,
    ):
        assert (found.pixels[SMALL] == [255, 0, 0]).all()


def test_unexpected_decoder_errors_are_raised_in_the_caller():
    def failing(data: bytes) -> Image.Image:
        raise AssertionError("a mistake in a source")

    problem = r"in failing(.|\n)*AssertionError: a mistake in a source"
    with decoding_process_pool(failing, 1, 1) as decoding:
        for _ in range(2):
            with (
                pytest.raises(RuntimeError, match=problem),
                decoding(make_batch(1), DecodingOptions((SMALL,))),
            ):
                pass


class UnpicklingFails:
    """Can be sent, but not received."""

    def __reduce__(self) -> tuple[object, ...]:
        return (int, ("no number",))


def test_a_decoder_that_cannot_be_unpickled_raises_its_error():
    with (
        decoding_process_pool(UnpicklingFails(), 1, 1) as decoding,
        pytest.raises(RuntimeError, match="invalid literal for int"),
        decoding(make_batch(1), DecodingOptions((SMALL,))),
    ):
        pass


def test_a_decoder_that_cannot_be_pickled_is_refused():
    lock = threading.Lock()

    def locked(data: bytes) -> Image.Image:
        with lock:
            return decode_image(data)

    problem = "cannot be sent to the decoding processes .* or use --device cpu"
    with pytest.raises(InputError, match=problem), decoding_process_pool(locked, 2, 1):
        pass
    assert list_decoding_processes() == []


def test_decoding_after_the_pool_has_closed_raises_and_writes_nothing(tmp_path):
    with (
        decoding_process_pool(decode_image, 1, 1) as decoding,
        decoding(make_batch(1), DecodingOptions((SMALL,))),
    ):
        pass
    # Files that are opened now get the numbers of what the processes had.
    files = [(tmp_path / str(i)).open("w+b") for i in range(4)]
    for count in (1, 30):
        with (
            pytest.raises((RuntimeError, ValueError)),
            decoding(make_batch(count), DecodingOptions((SMALL,))),
        ):
            pass
    assert [file.seek(0, os.SEEK_END) for file in files] == [0, 0, 0, 0]
    for file in files:
        file.close()


def test_closing_the_decoding_pool_leaves_no_open_files():
    def decode_some() -> None:
        with (
            decoding_process_pool(decode_image, 2, 2) as decoding,
            decoding(make_batch(3), DecodingOptions((SMALL,))),
        ):
            pass

    before = set(Path("/proc/self/fd").iterdir())
    decode_some()
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_decoding_processes_do_not_import_torch():
    with (
        decoding_process_pool(decode_image, 1, 1) as decoding,
        decoding(make_batch(1), DecodingOptions((SMALL,))),
    ):
        (process,) = list_decoding_processes()
        assert not [each.path for each in process.memory_maps() if "torch" in each.path]


def test_the_decoding_pool_is_shared_by_threads_and_ends_with_its_context():
    batches = [make_batch(CHUNK_IMAGES + 4, first=100 * i) for i in range(12)]
    with decoding_process_pool(decode_image, 2, 3) as decoding:
        # A process is listed by its command line, which it has once it runs Python.
        deadline = time.monotonic() + 60
        while len(list_decoding_processes()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(list_decoding_processes()) == 2

        def means(batch):
            with decoding(batch, DecodingOptions((SMALL,))) as decoded:
                time.sleep(0.01)
                return decoded.pixels[SMALL].mean(axis=(0, 2, 3, 4))

        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(means, batches))
    for batch, mean in zip(batches, found, strict=True):
        here = decode_batch(batch, decode_image, DecodingOptions((SMALL,)))
        np.testing.assert_array_equal(mean, here.pixels[SMALL].mean(axis=(0, 2, 3, 4)))
    assert list_decoding_processes() == []


def test_decoding_processes_end_when_their_parent_is_killed(tmp_path):
    program = (
        "from sfm.pipeline.decoding_processes import decoding_process_pool\n"
        "from sfm.pipeline.sources.decode import decode_image\n"
        "with decoding_process_pool(decode_image, 2, 1):\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "ready\n"
    decoding = psutil.Process(parent.pid).children()
    assert len(decoding) == 2
    # Ctrl-C reaches every process of the terminal's group: these are not in it.
    assert all(os.getpgid(each.pid) != os.getpgid(parent.pid) for each in decoding)
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(decoding, timeout=20)
    assert alive == []


def test_a_pass_with_a_killed_decoding_process_stops_and_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(partition_tasks, "MAX_TASK_ROWS", 90)
    source = open_source("builtin:fashion-mnist-6k")
    config = ExtractConfig(source=source.spec, store="s", backbone=["lite0"], limit_per_class=20)
    tasks = make_tasks(source, select_samples_if_labels_known(config, source))
    backbones = optimize_for_inference([load_backbone("lite0", image_size=32, device="cpu")], "float32")
    whole, cut = Staging(tmp_path / "whole"), Staging(tmp_path / "cut")
    for staging in (whole, cut):
        staging.root.mkdir()

    def left() -> int:
        return sum(
            find_unstaged_backbones_unless_complete(task, backbones, cut, PassOptions()) is not None
            for task in tasks
        )

    with extraction_runtime(source, "cuda", 1) as runtime:
        list(stage_tasks(source, tasks, backbones, whole, PassOptions(), runtime))
        steps = stage_tasks(source, tasks, backbones, cut, PassOptions(), runtime)
        while not next(steps).completed_partitions:
            pass
        os.kill(list_decoding_processes()[0].pid, signal.SIGKILL)
        with pytest.raises(IncompleteExtractionError, match="a process that decodes images died"):
            list(steps)
    assert 0 < left() < len(tasks)
    assert list_decoding_processes() == []
    with extraction_runtime(source, "cuda", 1) as runtime:
        list(stage_tasks(source, tasks, backbones, cut, PassOptions(), runtime))
    assert left() == 0
    files = [
        {str(file.relative_to(staging.root)): file.read_bytes() for file in staging.root.glob("*/*")}
        for staging in (whole, cut)
    ]
    assert files[0] == files[1]


def test_an_interrupted_extraction_joins_its_threads_before_closing_the_runtime(tmp_path, monkeypatch):
    threads_left: list[int] = []

    @contextlib.contextmanager
    def watched(source: Source, device: str, count: int) -> Iterator[ExtractionRuntime]:
        with extraction_runtime(source, "cuda", count) as runtime:
            try:
                yield runtime
            finally:
                threads_left.append(sum("features" in thread.name for thread in threading.enumerate()))

    def interrupted(event: Progress) -> None:
        if event.stage == "features" and event.done:
            raise KeyboardInterrupt

    monkeypatch.setattr(extract_module, "extraction_runtime", watched)
    config = ExtractConfig(
        source="builtin:fashion-mnist-6k", store=str(tmp_path / "s"), backbone=["lite0"], image_size=32
    )
    with pytest.raises(KeyboardInterrupt):
        extract_module.extract(config, interrupted)
    assert threads_left == [0]
    assert list_decoding_processes() == []


def test_a_worker_restarts_a_killed_decoding_process_for_the_next_partition(tmp_path, monkeypatch):
    monkeypatch.setattr(
        dask_worker, "extraction_runtime", lambda source, _, count: extraction_runtime(source, "cuda", count)
    )
    source = open_source("builtin:fashion-mnist-6k")
    listing = tuple(split.listing_digest for split in source.splits.values())
    card = load_backbone("lite0", image_size=32, device="cpu").card
    worker_config = dask_worker.WorkerConfig(
        source.spec, listing, (("lite0", card.hash),), 32, "cpu", str(tmp_path), PassOptions(), 1, ()
    )
    tasks = [PartitionTask("train", number, np.arange(50) + 50 * number) for number in range(3)]
    try:
        assert dask_worker.stage_task(worker_config, tasks[0]).image_count == 50
        for each in list_decoding_processes():
            os.kill(each.pid, signal.SIGKILL)
        with pytest.raises(IncompleteExtractionError):
            dask_worker.stage_task(worker_config, tasks[1])
        assert dask_worker.stage_task(worker_config, tasks[1]).image_count == 50
        # A config that cannot be opened does not leave the one before without its processes.
        with pytest.raises(InputError, match="other weights"):
            dask_worker.stage_task(
                replace(worker_config, backbone_specs_and_hashes=(("lite0", "another"),)), tasks[2]
            )
        assert list_decoding_processes() == []
        assert dask_worker.stage_task(worker_config, tasks[2]).image_count == 50
    finally:
        dask_worker.release_worker_resources()
    assert list_decoding_processes() == []
