"""The partial results of an interrupted evaluation, beside its result."""

from collections.abc import Sequence
from pathlib import Path


def get_work_folder_path(result_path: Path) -> Path:
    """Return the folder that keeps unfinished work on a result."""
    return result_path.with_name(f"{result_path.stem}.partial")


def format_interruption_message(result_paths: Sequence[Path]) -> str:
    """Return a line that says whether an interrupted evaluation left work to resume from, and where."""
    folders = [get_work_folder_path(path) for path in result_paths]
    unfinished = [folder for folder in folders if folder.is_dir() and any(folder.iterdir())]
    if unfinished:
        return f"interrupted; partial results are in {unfinished[-1]}: run the same command again to resume"
    return "interrupted without partial results: run the same command again to start over"
