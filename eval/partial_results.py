"""Work that an interrupted evaluation leaves beside its result."""

from collections.abc import Sequence
from pathlib import Path


def get_work_folder_path(result_path: Path) -> Path:
    """Return the folder that keeps unfinished work on a result."""
    return result_path.with_name(f"{result_path.stem}.partial")


def describe_partial_results(result_paths: Sequence[Path]) -> str:
    """Return a line that says whether an interrupted evaluation left work to resume from, and where."""
    folders = [get_work_folder_path(path) for path in result_paths]
    kept = [folder for folder in folders if folder.is_dir() and any(folder.iterdir())]
    if kept:
        return f"interrupted; what is done is in {kept[-1]}: the same command goes on from there"
    return "interrupted before anything was done that could be kept: the same command starts again"
