"""Names of datasets: which there may be, what is derived from a folder, how a pin is told from a name."""

from pathlib import Path

import pytest

from sfm.stats_store.dataset_names import (
    find_dataset_name_problem,
    make_dataset_name,
    make_dataset_name_from_folder,
    split_pinned_name,
)


@pytest.mark.parametrize("name", ["", "birds@2024", " birds", "birds ", "a\nb", "a\x1b[2J", "safe\u202etxt"])
def test_invalid_dataset_name_is_refused(name):
    assert find_dataset_name_problem(name)
    assert find_dataset_name_problem(make_dataset_name(name)) is None


@pytest.mark.parametrize("name", ["birds", "pets [raw]", "c#", "猫", "a b"])
def test_valid_dataset_name_is_unchanged(name):
    assert find_dataset_name_problem(name) is None
    assert make_dataset_name(name) == name


def test_make_dataset_name_replaces_invalid_characters():
    assert make_dataset_name("birds@2024") == "birds-2024"
    assert make_dataset_name("cat\nFelis") == "cat-Felis"
    assert make_dataset_name("e\u0301te\u0301") == "été"
    assert make_dataset_name("caf\udce9") == r"caf\xe9"


def test_dataset_name_of_a_linked_folder_is_the_link_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "v2" / "inside").mkdir(parents=True)
    (tmp_path / "birds").symlink_to("v2")
    assert make_dataset_name_from_folder(tmp_path / "birds") == "birds"
    assert make_dataset_name_from_folder(Path(f"{tmp_path}/birds/inside/..")) == "birds"
    assert make_dataset_name_from_folder(Path("/")) == "dataset"
    monkeypatch.chdir(tmp_path / "v2")
    assert make_dataset_name_from_folder(Path()) == "v2"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("birds", ("birds", "")),
        ("birds@2024", ("birds@2024", "")),
        ("birds@2024@abc", ("birds@2024", "abc")),
        ("birds@2024@tuning", ("birds@2024", "tuning")),
        ("birds@abc", ("birds", "abc")),
        ("cats@abc", ("cats", "abc")),
    ],
)
def test_exact_dataset_name_takes_precedence_over_a_pin(text, meant):
    assert split_pinned_name(text, {"birds", "birds@2024"}) == meant
