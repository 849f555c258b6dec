"""Paths as people give them: ``~`` without a home, and folders that are empty but for what systems leave."""

import os
from pathlib import Path
from typing import Any

from sfm.errors import InputError

CLUTTER_NAMES = frozenset(
    {"lost+found", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
)
"""What operating systems put into folders by themselves, besides hidden files; in lower case."""


def expand_home(path: str | Path) -> Path:
    """Return a path with ``~`` expanded.

    Raises
    ------
    InputError
        If there is no home folder for it to stand for, as in a container that runs as another user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{path}: no home folder is known for {Path(path).parts[0]} (HOME is not set): give a full path"
        ) from None


def resolve_links(path: Path) -> Path:
    """Return the path behind all links; of links in a circle, which `Path.resolve` raises for, their own."""
    return Path(os.path.realpath(path))


def expand_home_in_field(value: Any) -> Any:
    """Expand ``~`` in a field of a configuration: a path, a list of paths, or None."""
    if isinstance(value, list):
        return [expand_home(path) for path in value]
    return value if value is None else expand_home(value)


def get_cache_folder() -> Path | None:
    """Return the user's folder for caches; None where there is no home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if Path(chosen).is_absolute():
        return Path(chosen)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def is_clutter(name: str) -> bool:
    """Say whether a file of this name counts as no content: hidden, or left by an operating system."""
    return name.startswith(".") or name.lower() in CLUTTER_NAMES


def list_content(folder: Path) -> list[Path]:
    """Return what a folder holds, but for clutter."""
    return [path for path in folder.iterdir() if not is_clutter(path.name)]
