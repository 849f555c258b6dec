"""Paths of users: ``~``, links, caches, and folders that hold only clutter of the operating system."""

import os
from pathlib import Path

from sfm.errors import InputError

CLUTTER_NAMES = frozenset(
    {"lost+found", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
)
"""Files that operating systems put into folders by themselves, besides hidden ones; in lower case."""


def expand_home(path: str | Path) -> Path:
    """Return a path with ``~`` expanded.

    Raises
    ------
    InputError
        If there is no home folder, as in a container that runs as another user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{path}: no home folder is known for {Path(path).parts[0]} (HOME is not set): give a full path"
        ) from None


def resolve_links(path: Path) -> Path:
    """Return a path with all symbolic links resolved; links in a circle do not raise."""
    return Path(os.path.realpath(path))


def expand_home_in_path_or_list(value: str | Path | list[str | Path] | None) -> Path | list[Path] | None:
    """Return a config value with ``~`` expanded: a path, a list of paths, or None."""
    if isinstance(value, list):
        return [expand_home(path) for path in value]
    return None if value is None else expand_home(value)


def get_cache_folder() -> Path | None:
    """Return the user's cache folder; None if there is no home folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():
        return folder
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def is_hidden_or_system_file(name: str) -> bool:
    """Return whether a file of this name is hidden, or was left by an operating system."""
    return name.startswith(".") or name.lower() in CLUTTER_NAMES


def list_without_hidden_and_system_files(folder: Path) -> list[Path]:
    """Return the paths in a folder, without hidden files and those that operating systems leave."""
    return [path for path in folder.iterdir() if not is_hidden_or_system_file(path.name)]
