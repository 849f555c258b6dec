"""Files that are there whole, or not at all."""

import os
from pathlib import Path

from sfm.errors import InputError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or, after an error, as it was; its folder is made if need be.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
