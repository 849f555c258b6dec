import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS_PROGRAM = """
import resource, sys
from sfm.backbones.execution.allocator import configure_malloc_to_keep_memory, configure_malloc_single_heap

how, megabytes, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if how == "keep" and where == "thread":
    configure_malloc_single_heap()
from concurrent.futures import ThreadPoolExecutor

def step(megabytes):
    activations = [b"x" * (2**20 * megabytes) for _ in range(2)]

if how == "keep":
    configure_malloc_to_keep_memory()
with ThreadPoolExecutor(1) as pool:
    run = pool.map if where == "thread" else map
    list(run(step, [megabytes] * 5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(run(step, [megabytes] * 5))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(("megabytes", "where"), [(8, "main"), (80, "thread")])
def test_freed_memory_is_reused_without_page_faults(megabytes: int, where: str) -> None:
    eager = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", COUNT_FAULTS_PROGRAM, how, str(megabytes), where]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | eager)
        return int(ended.stdout)

    assert faults("keep") < faults("leave") / 10


COUNT_HEAPS_PROGRAM = """
import ctypes, sys
from sfm.cli import app

app(sys.argv[1:], standalone_mode=False)
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(library.fopen(b"/dev/stdout", b"w"))
library.malloc_info(0, out)
library.fflush(out)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_info")
@pytest.mark.slow
def test_extraction_threads_share_one_heap_for_large_images(tmp_path: Path) -> None:
    def heaps(image_size: int) -> int:
        store = tmp_path / str(image_size)
        extract = ["extract", "builtin:fashion-mnist-6k", "--store", str(store), "--backbone", "lite0"]
        options = ["--image-size", str(image_size), "--limit-per-class", "6", "--quiet"]
        command = [sys.executable, "-c", COUNT_HEAPS_PROGRAM, *extract, *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("<heap nr=")

    assert heaps(160) == 1
    assert heaps(32) > 1
