import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from concurrent.futures import ThreadPoolExecutor
from sfm.backbones.memory import keep_freed_memory

def step(megabytes):
    activations = [torch.ones(2**18 * megabytes) for _ in range(4)]

how, image_size, megabytes, threads = sys.argv[1], *map(int, sys.argv[2:])
if how == "keep":
    keep_freed_memory(image_size)
with ThreadPoolExecutor(threads) as pool:
    run = map if threads == 1 else pool.map
    list(run(step, [megabytes] * 5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(run(step, [megabytes] * 5))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(
    ("image_size", "megabytes", "threads"),
    [pytest.param(96, 8, 1, id="small-images"), pytest.param(224, 96, 2, id="large-images-in-threads")],
)
def test_memory_that_is_freed_and_asked_for_again_is_not_cleared_by_the_kernel(
    image_size: int, megabytes: int, threads: int
) -> None:
    eager = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how, *map(str, (image_size, megabytes, threads))]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | eager)
        return int(ended.stdout)

    assert faults("keep") < faults("leave") / 10
