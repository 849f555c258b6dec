"""Rows in NPY files, read only if they are what is expected: unfinished work may be anybody's, or damaged."""

import os
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.untrusted_files import open_regular_file

NPY_ERRORS = (OSError, ValueError, TypeError, LookupError, SyntaxError, EOFError, RecursionError, MemoryError)
"""How numpy fails on a header that it has not written."""


class DamagedRowsError(InputError):
    """A file does not hold the rows that it should."""


def write_rows(out: IO[bytes], rows: npt.NDArray[Any]) -> None:
    """Write rows to a file, row after row."""
    rows = np.ascontiguousarray(rows)
    # numpy's own way of writing to a file forgets why it failed, e.g. that the disk is full.
    np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(rows))
    out.write(rows.tobytes())


def read_rows(
    path: Path, dtype: npt.DTypeLike, rows: int, columns: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    """Read rows; nothing is unpickled, and no memory taken for what the file does not hold.

    Parameters
    ----------
    path : Path
    dtype : dtype
    rows : int
    columns : tuple of int, optional
        Shape of a row; by default, it is a vector of any length.

    Raises
    ------
    DamagedRowsError
        If the file is not there, is no regular file, or holds anything else; names it.
    """
    try:
        with open_regular_file(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not a file of rows")
            shape, by_columns, found = np.lib.format.read_array_header_1_0(file)
            fits = len(shape) == 2 if columns is None else shape[1:] == columns
            if not fits or shape[:1] != (rows,) or by_columns or found != np.dtype(dtype):
                raise ValueError(f"{found} of shape {shape}")
            count = int(np.prod(shape, dtype=object))
            if os.fstat(file.fileno()).st_size - file.tell() != count * found.itemsize:
                raise ValueError("it is longer or shorter than it says")
            return np.fromfile(file, dtype=found, count=count).reshape(shape)
    except (*NPY_ERRORS, tokenize.TokenError) as error:
        raise DamagedRowsError(
            f"unfinished work in {path} is damaged or gone: run again, and it is computed anew"
        ) from error


def has_valid_rows(
    path: Path, dtype: npt.DTypeLike, rows: int, columns: tuple[int, ...] | None = None
) -> bool:
    """Say whether a file holds such rows, and finite values only."""
    try:
        return bool(np.isfinite(read_rows(path, dtype, rows, columns)).all())
    except DamagedRowsError:
        return False
