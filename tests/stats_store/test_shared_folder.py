"""A store on a team's disk: whatever the umasks, what one publishes the others can use, and nobody blocks."""

import datetime
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from other_users import TEAM, act_as_user, needs_root, shared_folder
from toy_entries import age_files, make_backbone_card, publish_random_entry
from typer.testing import CliRunner, Result

from sfm.cli import app
from sfm.errors import InputError
from sfm.pipeline.partition_tasks import PartitionTask
from sfm.pipeline.staging import open_staging_and_delete_on_success
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

pytestmark = needs_root

ANNA, BEN, CLEO = 12345, 12346, 12347
TASK = PartitionTask("train", 0, None)
NOTHING = datetime.timedelta(0)


def run_sfm_store(*words: object) -> Result:
    """Run ``sfm store`` with these words."""
    return CliRunner().invoke(app, ["store", *map(str, words)], env={"COLUMNS": "140"})


@pytest.fixture
def team_store() -> Iterator[Path]:
    """Where the team's store is: made by Anna, with the umask of a team."""
    with shared_folder() as team:
        with act_as_user(ANNA, 0o002):
            publish_random_entry(open_or_create_store(str(team / "store")), 0, dataset="birds")
        yield team / "store"


def leave_staging(folder: Path, key: str, like: Path | None = None) -> None:
    """Begin an extraction that does not end."""
    with suppress(RuntimeError), open_staging_and_delete_on_success(folder, key, like) as staging:
        staging.write_array("kind", TASK, np.zeros((1, 2)))
        raise RuntimeError


def make_private(path: Path) -> None:
    """Make a file or folder its owner's alone, as versions before this one did under umask 077."""
    path.chmod(0o700 if path.is_dir() else 0o600)


def test_publishing_under_umask_077_uses_permissions_and_group_of_the_store(team_store: Path) -> None:
    with act_as_user(CLEO, 0o077):
        publish_random_entry(
            open_or_create_store(str(team_store)), 1, dataset="boats", backbone=make_backbone_card("lite1")
        )
    for path in [p for p in team_store.rglob("*") if p.stat().st_uid == CLEO]:
        assert path.stat().st_gid == TEAM
        assert stat.S_IMODE(path.stat().st_mode) == (0o2775 if path.is_dir() else 0o664), path
    with act_as_user(BEN, 0o022):
        store = open_store(str(team_store))
        assert [s.dataset for s in store.list_summaries()] == ["birds", "boats"]
        assert [v.is_sound for v in verify_entries(store)] == [True, True]
        remove_entry(store, store.list_summaries()[1])
    with act_as_user(ANNA, 0o002):
        assert [g.reason for g in collect_garbage(store, min_age=NOTHING).deleted] == ["removed"]


def test_private_store_stays_private_under_any_umask() -> None:
    with shared_folder() as team, act_as_user(ANNA, 0o077):
        open_or_create_store(str(team / "mine"))
        os.umask(0o002)
        publish_random_entry(open_or_create_store(str(team / "mine")))
        assert not [p for p in (team / "mine").rglob("*") if p.stat().st_mode & 0o077]


@pytest.mark.parametrize("hidden", ["commit", "key", "run"])
def test_unreadable_files_of_another_user_are_skipped_with_a_note(team_store: Path, hidden: str) -> None:
    with act_as_user(CLEO, 0o002):
        store = open_or_create_store(str(team_store))
        boats = publish_random_entry(store, 1, dataset="boats", backbone=make_backbone_card("lite1"))
        draft = Draft(store)
        draft.write_array("train/count", np.arange(3))
        run = store.read_entry_commit(boats).run
        paths = {
            "commit": team_store / "index" / boats.key / "00000001.json",
            "key": team_store / "index" / boats.key,
            "run": team_store / "runs" / run,
        }
        make_private(paths[hidden])
    with act_as_user(BEN, 0o002):
        store = open_or_create_store(str(team_store))
        listed = run_sfm_store("ls", team_store)
        assert listed.exit_code == 0
        if hidden != "run":
            assert "note: left out: " in listed.stdout
            assert "is of user 12347" in listed.stdout.replace("\n", "")
            assert [s.dataset for s in store.list_summaries()] == ["birds"]
        assert run_sfm_store("show", team_store, "birds").exit_code == 0
        checked = run_sfm_store("verify", team_store, "--quiet")
        assert (checked.exit_code, "DAMAGED" in checked.stdout) == (0, False)
        assert "note: left out: " in checked.stdout
        publish_random_entry(store, 2, dataset="birds", replace=True)
        birds = next(s for s in store.list_summaries() if s.dataset == "birds")
        done = collect_garbage(store, min_age=NOTHING, delete_replaced_now=True)
        assert [g.reason for g in done.deleted] == ["replaced"]
        assert any("12347" in note for note in done.notes)
        assert (
            copy_entries(store, open_or_create_store(str(team_store.parent / "kept")), [birds])[0].outcome
            == "copied"
        )
    assert (team_store / "runs" / run).is_dir()
    assert (team_store / "runs" / draft.run_id).is_dir()


def test_unwritable_store_folder_is_refused_with_its_owner_mode_and_a_remedy() -> None:
    with shared_folder() as team:
        with act_as_user(ANNA, 0o022):
            publish_random_entry(open_or_create_store(str(team / "store")))
        with act_as_user(BEN, 0o022):
            with pytest.raises(InputError) as error:
                open_or_create_store(str(team / "store"))
            assert len(open_store(str(team / "store")).list_summaries()) == 1
        for word in (
            "permission denied: ",
            "store is of user 12345, mode 2755",
            "chmod -R g+rwX",
            "umask 002",
        ):
            assert word in str(error.value)
        # The folder is opened, and those below, of an earlier version, are not.
        (team / "store").chmod(0o2775)
        with act_as_user(BEN, 0o002), pytest.raises(InputError, match="store/index is of user 12345"):
            open_or_create_store(str(team / "store"))


def test_unreadable_staging_of_another_user_does_not_block_extraction_or_gc(team_store: Path) -> None:
    with act_as_user(CLEO, 0o077):
        leave_staging(team_store / "staging", "key")
        for path in ("key", "key.lock"):
            make_private(team_store / "staging" / path)
        (team_store / "staging").chmod(0o2775)
    with act_as_user(BEN, 0o022):
        with open_staging_and_delete_on_success(team_store / "staging", "key", team_store) as staging:
            assert staging.root.name.startswith("key-")
        age_own_files(team_store / "staging")
        assert collect_garbage(open_store(str(team_store)), min_age=NOTHING).deleted == []


def age_own_files(folder: Path) -> None:
    """Set times back where one may."""
    with pytest.raises(PermissionError):
        age_files(folder)


def test_staging_left_by_one_user_is_resumed_by_another(team_store: Path) -> None:
    with act_as_user(CLEO, 0o077):
        leave_staging(team_store / "staging", "key", team_store)
    with (
        act_as_user(BEN, 0o077),
        open_staging_and_delete_on_success(team_store / "staging", "key", team_store) as staging,
    ):
        assert staging.has_valid_array("kind", TASK, np.float64, 1, (2,))
        staging.write_array("kind", TASK, np.ones((1, 2)))
    assert list((team_store / "staging").iterdir()) == []
