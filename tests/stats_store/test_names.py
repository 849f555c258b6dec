"""Names of datasets: which there may be, what is derived from a folder, how a pin is told from a name."""

from pathlib import Path

import pytest

from sfm.stats_store.names import folder_name, name_from, problem_with_name, split_pin


@pytest.mark.parametrize("name", ["", "birds@2024", " birds", "birds ", "a\nb", "a\x1b[2J", "safe\u202etxt"])
def test_a_name_that_cannot_be_typed_or_shown_is_refused(name):
    assert problem_with_name(name)
    assert problem_with_name(name_from(name)) is None


@pytest.mark.parametrize("name", ["birds", "pets [raw]", "c#", "猫", "a b"])
def test_any_other_name_stays_as_it_is(name):
    assert problem_with_name(name) is None
    assert name_from(name) == name


def test_what_a_name_cannot_hold_becomes_a_dash():
    assert name_from("birds@2024") == "birds-2024"
    assert name_from("cat\nFelis") == "cat-Felis"
    assert name_from("e\u0301te\u0301") == "été"
    assert name_from("caf\udce9") == r"caf\xe9"


def test_a_linked_folder_is_named_after_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "v2" / "inside").mkdir(parents=True)
    (tmp_path / "birds").symlink_to("v2")
    assert folder_name(tmp_path / "birds") == "birds"
    assert folder_name(Path(f"{tmp_path}/birds/inside/..")) == "birds"
    assert folder_name(Path("/")) == "dataset"
    monkeypatch.chdir(tmp_path / "v2")
    assert folder_name(Path()) == "v2"


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
def test_an_exact_name_comes_before_a_pin(text, meant):
    assert split_pin(text, {"birds", "birds@2024"}) == meant
