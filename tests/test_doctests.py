"""Examples in docstrings and in CONTRIBUTING.md run as they are printed."""

import doctest
import importlib
from pathlib import Path

import pytest

import sfm

ROOT = Path(sfm.__file__).parents[1]
ROOMS = ("sfm", "backbones", "stats_store", "pipeline", "distill", "eval")


def list_modules_with_examples() -> list[str]:
    files = [
        file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")) if ">>> " in file.read_text()
    ]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name if name.startswith("sfm.") else f"sfm.{name}" for name in names]


@pytest.mark.parametrize("name", list_modules_with_examples())
def test_docstring_examples_run_as_doctests(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert attempted > 0
    assert failed == 0
