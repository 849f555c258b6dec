"""Ctrl-C from the first moment on: one line, status 130, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SFM = str(Path(sys.executable).with_name("sfm"))

WHEN_IMPORTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Interrupting())
"""


def interrupted(
    tmp_path: Path, module: str, number: signal.Signals, command: list[str]
) -> "subprocess.CompletedProcess[str]":
    """Run a command that gets a signal at the moment when it imports a module."""
    (tmp_path / "sitecustomize.py").write_text(WHEN_IMPORTED.format(module=module, number=int(number)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("typer", signal.SIGINT),
        ("sfm.store_commands", signal.SIGTERM),
        ("torch", signal.SIGINT),
        ("torch.nn", signal.SIGTERM),
        ("numpy.linalg", signal.SIGINT),
        ("timm", signal.SIGINT),
    ],
)
def test_a_signal_while_modules_are_imported_is_one_line(
    tmp_path: Path, module: str, number: signal.Signals
) -> None:
    distilling = ["distill", "--store", "nowhere", "--backbone", "lite0", "--dataset", "d"]
    command = [sys.executable, "-m", "sfm", *distilling, "--out", str(tmp_path / "run")]
    done = interrupted(tmp_path, module, number, command)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
    assert not (tmp_path / "run").exists()


def test_the_installed_command_starts_so_too(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "typer", signal.SIGINT, [sys.executable, SFM, "--help"])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_command_in_the_background_goes_on_ignoring_ctrl_c() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from sfm.interrupts import take_signals; take_signals()\n"
        "signal.raise_signal(signal.SIGINT); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "still here\n")
