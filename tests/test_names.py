"""One word means one thing: no two modules give one name to different things."""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("backbones", "stats_store", "pipeline", "distill", "eval")

SHARED_NAMES = {
    "main": "the entry point of a script",
    "__getattr__": "Python's hook for names that a module imports when they are first used",
}
"""Names that several modules may define, and why."""

SHARED_STEMS = {"config": "the config of the command that a folder is about"}
"""Names that several modules may have, and why."""


def list_modules(*folders: str) -> list[Path]:
    """Return the modules in folders of the repository; those that links lead to are in one place only."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file for file in dict.fromkeys(files) if not any(path.is_symlink() for path in file.parents)]


def find_repeated(pairs: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """Return the names of several modules, with these modules."""
    found = defaultdict(list)
    for name, file in pairs:
        found[name].append(file.relative_to(ROOT).as_posix())
    return {name: files for name, files in found.items() if len(files) > 1}


def test_module_level_definitions_have_unique_names() -> None:
    definitions = (
        (node.name, file)
        for file in list_modules("sfm", *ROOMS, "benchmarks")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name not in SHARED_NAMES
    )
    assert find_repeated(definitions) == {}


def test_module_names_are_unique() -> None:
    # Benchmarks are commands that are named after what they measure.
    modules = [
        file
        for file in list_modules("sfm", *ROOMS)
        if not file.stem.startswith("__") and file.stem not in SHARED_STEMS
    ]
    assert find_repeated((file.stem, file) for file in modules) == {}
