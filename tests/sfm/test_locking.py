"""One writer at a time for an output folder, whatever becomes of that writer."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from other_users import act_as_user, needs_root, shared_folder

from sfm import locking
from sfm.distill.config import DistillConfig
from sfm.distill.run import distill
from sfm.errors import InputError
from sfm.locking import LOCK_NAME, lock_output_folder, lock_output_path
from sfm.quickstart import run_quickstart

HOLD = """
import sys
from pathlib import Path
from sfm.locking import lock_output_folder
with lock_output_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _disable_lock_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "MAX_WAIT_SECONDS", 0.0)


@contextmanager
def lock_in_another_process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_locked_folder_is_refused_naming_the_holder_process(tmp_path: Path) -> None:
    with lock_in_another_process(tmp_path / "run") as writer:
        message = (
            rf"run is being written by process {writer.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        )
        with pytest.raises(InputError, match=message), lock_output_folder(tmp_path / "run"):
            pytest.fail("two processes write one folder")


@pytest.mark.parametrize("lock_content", [b"[" * 100_000, b"{}", b"{" + b" " * 2**20])
def test_lock_with_unreadable_content_is_still_held(tmp_path: Path, lock_content: bytes) -> None:
    with lock_in_another_process(tmp_path / "run"):
        (tmp_path / "run" / LOCK_NAME).write_bytes(lock_content)
        with (
            pytest.raises(InputError, match="is being written by another process"),
            lock_output_folder(tmp_path / "run"),
        ):
            pytest.fail("two processes write one folder")


def test_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    with lock_in_another_process(tmp_path / "run") as writer:
        writer.kill()
        writer.wait()
        assert (tmp_path / "run" / LOCK_NAME).exists()
        with lock_output_folder(tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_empty_output_folder_is_removed_on_release(tmp_path: Path) -> None:
    with lock_output_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with lock_output_path(tmp_path / "a" / "report.html"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_kept_on_release(tmp_path: Path) -> None:
    with lock_output_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("kept")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_locking_is_skipped_where_it_is_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with lock_output_folder(tmp_path / "file"):
        pass

    def raise_no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", raise_no_locks)
    with lock_output_folder(tmp_path / "run"), lock_output_folder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_lock_that_links_to_another_file_is_refused_and_the_file_is_kept(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "run").mkdir()
    link(tmp_path / "thesis.tex", tmp_path / "run" / LOCK_NAME)
    message = r"run/\.lock (is a symbolic link|has other hard links).* cannot be a lock: delete it"
    with pytest.raises(InputError, match=message), lock_output_folder(tmp_path / "run"):
        pytest.fail("it is locked")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_named_pipe_as_lock_file_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_NAME)
    with (
        pytest.raises(InputError, match="has other hard links or is not a file"),
        lock_output_folder(tmp_path),
    ):
        pass


@needs_root
def test_lock_file_created_by_another_user_still_locks() -> None:
    with shared_folder() as team:
        run = team / "run"
        with act_as_user(12345):
            run.mkdir(mode=0o2775)
            run.chmod(0o2775)
            (run / LOCK_NAME).touch()
        with (
            lock_in_another_process(run),
            act_as_user(12346),
            pytest.raises(InputError, match="is being written by"),
            lock_output_folder(run),
        ):
            pass


@pytest.mark.parametrize("resume", [False, True])
def test_concurrent_distillation_into_the_same_folder_is_refused(tmp_path: Path, resume: bool) -> None:
    config = DistillConfig(store="s", backbone="lite0", dataset="d", out=tmp_path / "run", resume=resume)
    with (
        lock_in_another_process(config.out),
        pytest.raises(InputError, match=re.escape(f"{config.out} is being written by process")),
    ):
        distill(config)


def test_concurrent_quickstart_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with lock_output_folder(tmp_path / "q"), pytest.raises(InputError, match="is being written by process"):
        run_quickstart(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []
