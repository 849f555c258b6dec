"""Open parquet files, and read their labels and images within bounded memory."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import DataFile, open_seekable
from sfm.pipeline.sources.limits import MAX_NAME_CHARACTERS
from sfm.text import get_first_error_line, sanitize_line
from sfm.untrusted_files import MAX_JSON_BYTES

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

LABEL_BATCH_ROWS = 16_384
MAX_THRIFT_STRING_BYTES = MAX_JSON_BYTES
"""Maximum size of a text in the footer of a file, such as the metadata that name classes."""

MAX_THRIFT_ITEMS = 1_000_000
"""Maximum length of a list in the footer, such as that of row groups."""


@contextlib.contextmanager
def open_parquet_file(
    file: DataFile, dictionary_columns: Sequence[str] = ()
) -> "Iterator[pyarrow.parquet.ParquetFile]":
    """Open a parquet file.

    Parameters
    ----------
    file : DataFile
    dictionary_columns : sequence of str
        Paths of columns to read as dictionaries, with repeated values in memory once.

    Raises
    ------
    InputError
        If it cannot be read, is damaged, or claims more rows than it can hold.
    """
    import pyarrow
    import pyarrow.parquet

    handle = open_seekable(file)
    try:
        content = pyarrow.PythonFile(handle, mode="r")
        metadata = pyarrow.parquet.ParquetFile(
            content,
            thrift_string_size_limit=MAX_THRIFT_STRING_BYTES,
            thrift_container_size_limit=MAX_THRIFT_ITEMS,
        ).metadata
        require_plausible_row_count(metadata, file)
        with pyarrow.parquet.ParquetFile(
            content,
            metadata=metadata,
            buffer_size=1 << 20,
            read_dictionary=[
                path for path in list_byte_and_text_columns(metadata) if path in dictionary_columns
            ],
        ) as table:
            yield table
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.url} holds text that is not UTF-8: {bytes(error.object)[:40]!r}; write its labels as "
            f"UTF-8"
        ) from error
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        line = sanitize_line(get_first_error_line(error), 300)
        raise InputError(f"{file.url} is damaged, truncated or no parquet file: {line}") from error
    finally:
        handle.close()


def list_byte_and_text_columns(metadata: "pyarrow.parquet.FileMetaData") -> list[str]:
    """Return the paths of the columns of bytes and of text."""
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def require_plausible_row_count(metadata: "pyarrow.parquet.FileMetaData", file: DataFile) -> None:
    """Refuse a file that claims more rows than it has bytes, even with repeated images.

    Raises
    ------
    InputError
        Names it.
    """
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows or sum(counts) > file.size_bytes:
        raise InputError(
            f"{file.url} is damaged: it claims {metadata.num_rows:,} rows in {file.size_bytes:,} bytes"
        )


def iter_stored_labels(
    table: "pyarrow.parquet.ParquetFile", file: DataFile, label_column: str
) -> Iterator[str | int | float | None]:
    """Yield the labels of a table that was opened with their column as a dictionary column.

    Raises
    ------
    InputError
        If the column holds neither numbers nor text, or text that is longer than any label.
    """
    import pyarrow
    import pyarrow.compute

    row = 0
    for batch in table.iter_batches(LABEL_BATCH_ROWS, columns=[label_column], use_threads=False):
        labels = batch.column(label_column)
        kind = labels.type.value_type if isinstance(labels, pyarrow.DictionaryArray) else labels.type
        if pyarrow.types.is_nested(kind):
            raise InputError(
                f"row {row} of {file.url} has no usable label: found {sanitize_line(str(kind), 60)}"
            )
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            texts = labels.dictionary if isinstance(labels, pyarrow.DictionaryArray) else labels
            longest = pyarrow.compute.max(pyarrow.compute.utf8_length(texts)).as_py() or 0
            if longest > MAX_NAME_CHARACTERS:
                raise InputError(
                    f"{file.url} has, from row {row} on, a class name of {longest:,} characters: at most "
                    f"{MAX_NAME_CHARACTERS:,} are read"
                )
        row += len(labels)
        yield from labels.to_pylist()


def require_unnested_image_column(
    table: "pyarrow.parquet.ParquetFile", file: DataFile, image_column: str
) -> None:
    """Refuse an image column of lists or other nested values, which hold no encoded image.

    Raises
    ------
    InputError
        Names the file.
    """
    import pyarrow

    kind = table.schema_arrow.field(image_column).type
    value_types = [field.type for field in kind] if pyarrow.types.is_struct(kind) else [kind]
    if any(map(pyarrow.types.is_nested, value_types)):
        raise InputError(
            f"{file.url} holds no encoded image in {image_column}: found {sanitize_line(str(kind), 60)}; "
            f"embed the image files in the table"
        )


def extract_image_bytes(cell: object, location: str) -> bytes:
    """Return the encoded image in a cell of bytes, or of a struct with a field ``bytes``.

    Raises
    ------
    InputError
        If it holds none; with the location and the type of the content.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        return data
    path = cell.get("path") if isinstance(cell, dict) else None
    found = f"only the path {path}" if path else "nothing" if data is None else type(data).__name__
    raise InputError(f"{location} holds no encoded image: found {found}; embed the image files in the table")
