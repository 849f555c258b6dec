"""Batches decoded by processes: the same as by threads, and never a process too many."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from sfm.backbones.build import load_backbone
from sfm.backbones.card import Preprocessing
from sfm.errors import InputError
from sfm.pipeline import staging as staging_module
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.decoding import Wanted, decode_batch, decoding_in_processes, decoding_process
from sfm.pipeline.features import Rules, equipped, missing, quickest, stage
from sfm.pipeline.selection import selection_of
from sfm.pipeline.sources import open_source
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.source import Sample
from sfm.pipeline.staging import Staging, Unfinished, tasks_of

SMALL, LARGE = (
    Preprocessing(input_size=size, resize=size + 8, resampling="bicubic", mean=(0.5,) * 3, std=(0.2,) * 3)
    for size in (24, 40)
)


def batch_of(count: int, broken: tuple[int, ...] = (), first: int = 0) -> list[tuple[int, Sample]]:
    rng = np.random.default_rng(first)
    found = []
    for place in range(first, first + count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(50, 60, 3), dtype=np.uint8)).save(file, "PNG")
        data = file.getvalue()[: 60 if place in broken else None]
        found.append((place, Sample(data, "bag", f"{place}.png")))
    return found


def children() -> list[psutil.Process]:
    """Those that decode; other tests have other children."""
    mine = psutil.Process().children()
    return [each for each in mine if "sfm.pipeline.decoding" in " ".join(each.cmdline())]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("wanted", [Wanted((SMALL,)), Wanted((SMALL, LARGE), views=2, seed=3)])
def test_a_process_answers_what_a_thread_would(wanted):
    with decoding_process(decode_image) as ask:
        # More and larger batches need more memory than the first.
        for count, first in ((3, 0), (40, 10), (2, 60)):
            batch = batch_of(count, first=first)
            here, there = decode_batch(batch, decode_image, wanted), ask(batch, wanted)
            assert there.kept == here.kept == list(range(first, first + count))
            assert (there.where, there.sizes, there.skipped) == (here.where, here.sizes, [])
            np.testing.assert_array_equal(there.digests, here.digests)
            assert list(there.pixels) == list(here.pixels) == list(wanted.preprocessings)
            for preprocessing, pixels in here.pixels.items():
                assert pixels.shape[:3] == (1 + wanted.views, count, preprocessing.input_size)
                assert pixels.any(axis=(2, 3, 4)).all()
                np.testing.assert_array_equal(there.pixels[preprocessing], pixels)


def test_what_cannot_be_decoded_is_skipped_or_named_by_a_process_too():
    batch = batch_of(5, broken=(0, 3))
    with decoding_process(decode_image) as ask:
        found = ask(batch, Wanted((SMALL,), on_error="skip"))
        assert found.kept == [1, 2, 4]
        assert [skipped.where for skipped in found.skipped] == ["0.png", "3.png"]
        whole = ask([batch[i] for i in (1, 2, 4)], Wanted((SMALL,)))
        with pytest.raises(InputError, match=r"cannot decode 0.png: .*--on-error skip"):
            ask(batch, Wanted((SMALL,)))
        # It is as good as before.
        again = ask(batch, Wanted((SMALL,), on_error="skip"))
        np.testing.assert_array_equal(again.pixels[SMALL], whole.pixels[SMALL])


def test_a_decoder_may_be_any_function_and_sees_the_same_modules(tmp_path, monkeypatch):
    (tmp_path / "colours.py").write_text("RED = (255, 0, 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import colours

    size = (9, 9)
    with decoding_process(lambda _: Image.new("RGB", size, colours.RED)) as ask:
        found = ask([(0, Sample(b"", "red", "nowhere"))], Wanted((SMALL,)))
    assert (found.pixels[SMALL] == [255, 0, 0]).all()


def test_a_process_that_decodes_loads_no_torch():
    with decoding_process(decode_image) as ask:
        ask(batch_of(1), Wanted((SMALL,)))
        (process,) = children()
        assert not [each.path for each in process.memory_maps() if "torch" in each.path]


def test_processes_are_shared_by_more_threads_and_end_with_the_context():
    batches = [batch_of(4, first=4 * i) for i in range(12)]
    with decoding_in_processes(decode_image, 2) as decoding:
        assert len(children()) == 2

        def means(batch):
            with decoding(batch, Wanted((SMALL,))) as decoded:
                time.sleep(0.01)
                return decoded.pixels[SMALL].mean(axis=(0, 2, 3, 4))

        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(means, batches))
    for batch, mean in zip(batches, found, strict=True):
        here = decode_batch(batch, decode_image, Wanted((SMALL,)))
        np.testing.assert_array_equal(mean, here.pixels[SMALL].mean(axis=(0, 2, 3, 4)))
    assert children() == []


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path):
    program = (
        "from sfm.pipeline.decoding import decoding_in_processes\n"
        "from sfm.pipeline.sources.decode import decode_image\n"
        "with decoding_in_processes(decode_image, 2):\n"
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
    wait_for(lambda: not any(each.is_running() and each.status() != "zombie" for each in decoding))


def test_a_pass_whose_process_is_killed_stops_and_goes_on_when_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(staging_module, "TASK_ROWS", 90)
    source = open_source("builtin:fashion-mnist-6k")
    config = ExtractConfig(source=source.spec, store="s", backbone=["lite0"], limit_per_class=20)
    tasks = tasks_of(source, selection_of(config, source))
    backbones = quickest([load_backbone("lite0", image_size=32, device="cpu")], "float32")
    whole, cut = Staging(tmp_path / "whole"), Staging(tmp_path / "cut")
    for staging in (whole, cut):
        staging.root.mkdir()

    def left() -> int:
        return sum(missing(task, backbones, cut, Rules()) is not None for task in tasks)

    with equipped(source, "cuda", 1) as equipment:
        list(stage(source, tasks, backbones, whole, Rules(), equipment))
        steps = stage(source, tasks, backbones, cut, Rules(), equipment)
        while not next(steps).partitions:
            pass
        os.kill(children()[0].pid, signal.SIGKILL)
        with pytest.raises(Unfinished, match="a process that decodes images was lost"):
            list(steps)
    assert 0 < left() < len(tasks)
    assert children() == []
    with equipped(source, "cuda", 1) as equipment:
        list(stage(source, tasks, backbones, cut, Rules(), equipment))
    assert left() == 0
    files = [
        {str(file.relative_to(staging.root)): file.read_bytes() for file in staging.root.glob("*/*")}
        for staging in (whole, cut)
    ]
    assert files[0] == files[1]
