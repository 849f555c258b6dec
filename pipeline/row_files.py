"""Rows in NPY files, validated when they are read: staged files are untrusted and may be damaged."""

import os
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.untrusted_files import open_regular_file

NPY_ERRORS = (OSError, ValueError, TypeError, LookupError, SyntaxError, EOFError, RecursionError, MemoryError)
"""Errors that numpy raises on a damaged header."""


class DamagedRowsError(InputError):
    """A file does not hold the expected rows."""


def write_rows(file: IO[bytes], rows: npt.NDArray[Any]) -> None:
    """Write an array of rows to an open file."""
    rows = np.ascontiguousarray(rows)
    # numpy's own function hides why it failed, e.g. that the disk is full.
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
    file.write(rows.tobytes())


def read_validated_rows(
    path: Path, dtype: npt.DTypeLike, row_count: int, row_shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    """Read rows; nothing is unpickled, and no more memory is allocated than the file has.

    Parameters
    ----------
    path : Path
    dtype : dtype
    row_count : int
    row_shape : tuple of int, optional
        Shape of a row; default: a vector of any length.

    Raises
    ------
    DamagedRowsError
        If the file does not exist, is no regular file, or holds anything else; names it.
    """
    try:
        with open_regular_file(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not a file of rows")
            shape, fortran_order, file_dtype = np.lib.format.read_array_header_1_0(file)
            shape_fits = len(shape) == 2 if row_shape is None else shape[1:] == row_shape
            if not shape_fits or shape[:1] != (row_count,) or fortran_order or file_dtype != np.dtype(dtype):
                raise ValueError(f"{file_dtype} of shape {shape}")
            count = int(np.prod(shape, dtype=object))
            if os.fstat(file.fileno()).st_size - file.tell() != count * file_dtype.itemsize:
                raise ValueError("its size does not match its header")
            return np.fromfile(file, dtype=file_dtype, count=count).reshape(shape)
    except (*NPY_ERRORS, tokenize.TokenError) as error:
        raise DamagedRowsError(
            f"unfinished work in {path} is damaged or gone: run again to compute it anew"
        ) from error


def has_finite_rows(
    path: Path, dtype: npt.DTypeLike, row_count: int, row_shape: tuple[int, ...] | None = None
) -> bool:
    """Return whether a file holds such rows, and finite values only."""
    try:
        return bool(np.isfinite(read_validated_rows(path, dtype, row_count, row_shape)).all())
    except DamagedRowsError:
        return False
