"""Settings of the whole process: the command line makes them, importing and using the library does not."""

import os
import subprocess
import sys

import pytest

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "CUBLAS_WORKSPACE_CONFIG")

MALLOC_CALLS = """
import ctypes, os
calls = []
class Watched(ctypes.CDLL):
    def __getattr__(self, name):
        calls.append(name)
        return super().__getattr__(name)
ctypes.CDLL = Watched
before = dict(os.environ)
%s
changed = sorted(name for name in %r if os.environ.get(name) != before.get(name))
print(changed, "mallopt" in calls)
"""


def list_changed_settings(code: str) -> str:
    """Return which variables a program changes, and whether it sets up the allocator."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", MALLOC_CALLS % (code, SETTINGS)],
        capture_output=True,
        text=True,
        check=True,
        env=clean,
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_importing_sfm_and_loading_a_backbone_change_no_process_settings() -> None:
    code = """
from sfm.api import *
from sfm.backbones.build import load_backbone
load_backbone("lite0", image_size=32, device="cpu")"""
    assert list_changed_settings(code) == "[] False"


@pytest.mark.slow
def test_the_command_line_changes_process_settings() -> None:
    code = """
from sfm.backbones.execution import wait_policy
wait_policy.psutil.cpu_percent = lambda *_, **__: [0.0] * 1024
from sfm.cli import app
app(["distill", "--store", "nowhere", "--backbone", "lite0", "--dataset", "d", "--out", "out"],
    standalone_mode=False)"""
    guarded = "try:\n" + "\n".join(f"    {line}" for line in code.strip().splitlines())
    changed = list_changed_settings(f"{guarded}\nexcept BaseException:\n    pass")
    assert changed == "['CUBLAS_WORKSPACE_CONFIG'] True"
