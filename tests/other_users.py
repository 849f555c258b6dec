"""Acting as another user of this machine, for a while: what a team's shared folder is about."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TEAM = 500
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


@contextmanager
def act_as_user(user: int, umask: int = 0o022) -> Iterator[None]:
    """Be this user, of the team's group, with this umask."""
    before = os.umask(umask)
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(TEAM, TEAM, 0)
    os.setresuid(user, user, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)
        os.umask(before)


@contextmanager
def shared_folder(mode: int = 0o2775) -> Iterator[Path]:
    """A folder that the team may write, at a place that everyone can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    team = folder / "team"
    team.mkdir()
    os.chown(team, 0, TEAM)
    team.chmod(mode)
    try:
        yield team
    finally:
        shutil.rmtree(folder)
