import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from sfm.backbones.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**21) for _ in range(8)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_that_is_freed_and_asked_for_again_is_not_cleared_by_the_kernel() -> None:
    eager = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | eager)
        return int(ended.stdout)

    assert faults("keep") < faults("leave") / 10
