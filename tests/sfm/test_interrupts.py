"""Ctrl-C from the first moment on: one line, status 130, no traceback."""

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sfm.cli import app
from sfm.terminal import print_next_command

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

WHEN_IMPORTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Interrupting())
"""


def run_interrupted(
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
def test_signal_during_imports_exits_130_with_one_line_error(
    tmp_path: Path, module: str, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    # timm is imported with a backbone, for a source that is there; the others before the store is looked for.
    arguments = (
        ["extract", "builtin:fashion-mnist-6k", "--store", str(out)]
        if module == "timm"
        else ["distill", "--store", "nowhere", "--dataset", "d", "--out", str(out)]
    )
    command = [sys.executable, "-m", "sfm", *arguments, "--backbone", "lite0"]
    done = run_interrupted(tmp_path, module, number, command)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
    assert not out.exists()


def test_signal_during_imports_of_the_console_script_exits_130(tmp_path: Path) -> None:
    installed = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"]["sfm"]
    module, _, function = installed.partition(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    done = run_interrupted(tmp_path, "typer", signal.SIGINT, [sys.executable, "-c", script, "--help"])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_background_command_keeps_ignoring_sigint() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from sfm import interrupts; interrupts.install_sigint_and_sigterm_handlers()\n"
        "signal.raise_signal(signal.SIGINT); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "still here\n")


def raise_keyboard_interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("work", "arguments", "left"),
    [
        (
            "sfm.pipeline.dry_run.estimate_extraction",
            ["extract", "folder:x", "--dry-run"],
            "a dry run saves nothing",
        ),
        ("sfm.pipeline.extract.extract", ["extract", "folder:x"], "run the same command again to resume"),
        (
            "sfm.distill.run.distill",
            ["distill", "--dataset", "d", "--out", "new"],
            "before anything was saved",
        ),
        ("sfm.distill.run.distill", ["distill", "--dataset", "d", "--out", "old"], "--resume to continue"),
        ("sfm.eval.report.page.report", ["report", "run", "--out", "x.html"], "no report was written"),
        (
            "sfm.eval.export.run_export.export",
            ["export", "run", "--format", "parquet", "--out", "x"],
            "nothing was exported",
        ),
        (
            "sfm.quickstart.run_quickstart",
            ["quickstart", "--out", "a b"],
            "`sfm quickstart --out 'a b'` again",
        ),
    ],
)
def test_interrupted_command_exits_130_and_reports_what_was_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    work: str,
    arguments: list[str],
    left: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old" / "checkpoint" / "step_00000100").mkdir(parents=True)
    monkeypatch.setattr(work, raise_keyboard_interrupt)
    if arguments[0] in ("extract", "distill"):
        arguments = [*arguments, "--store", "s", "--backbone", "lite0"]
    with pytest.raises(SystemExit) as end:
        app([*arguments, "--quiet"])
    output = capsys.readouterr()
    assert (end.value.code, output.out) == (130, "")
    assert output.err.startswith("error: interrupted")
    assert left in output.err
    assert output.err.count("\n") == 1


def test_next_command_is_shell_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    print_next_command("evaluate", "my run", "--store", "s3://team/stats", "--dataset", "it's")
    line = capsys.readouterr().out
    assert shlex.split(line.removeprefix("Next: ")) == [
        *("sfm", "evaluate", "my run", "--store", "s3://team/stats", "--dataset", "it's")
    ]
