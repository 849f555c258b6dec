import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from sfm.backbones.memory import keep_freed_memory, share_one_heap

how, megabytes, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if how == "keep" and where == "thread":
    share_one_heap()
from concurrent.futures import ThreadPoolExecutor

def step(megabytes):
    activations = [b"x" * (2**20 * megabytes) for _ in range(2)]

if how == "keep":
    keep_freed_memory()
with ThreadPoolExecutor(1) as pool:
    run = pool.map if where == "thread" else map
    list(run(step, [megabytes] * 5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(run(step, [megabytes] * 5))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(("megabytes", "where"), [(8, "main"), (80, "thread")])
def test_memory_that_is_freed_and_asked_for_again_is_not_cleared_by_the_kernel(
    megabytes: int, where: str
) -> None:
    eager = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how, str(megabytes), where]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | eager)
        return int(ended.stdout)

    assert faults("keep") < faults("leave") / 10
