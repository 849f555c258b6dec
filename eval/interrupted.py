"""What an interrupted evaluation leaves."""

from collections.abc import Sequence
from pathlib import Path


def work_folder(result: Path) -> Path:
    """Return where unfinished work on a result is kept."""
    return result.with_name(f"{result.stem}.partial")


def describe_partial_results(results: Sequence[Path]) -> str:
    """Say what an interrupted evaluation has left to go on from, if anything."""
    kept = [
        folder for result in results if (folder := work_folder(result)).is_dir() and any(folder.iterdir())
    ]
    if kept:
        return f"interrupted; what is done is in {kept[-1]}: the same command goes on from there"
    return "interrupted before anything was done that could be kept: the same command starts again"
