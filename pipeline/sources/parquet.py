"""``parquet:PATTERN``: image datasets as the Hugging Face hub holds them, from disks, servers or buckets."""

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.class_labels import (
    ClassList,
    class_id_from_label,
    class_id_from_number,
    encode_label_list,
    format_numeric_label,
    normalize_class_name,
    read_class_list,
    require_consistent_labels,
)
from sfm.pipeline.sources.class_subsets import take_positions
from sfm.pipeline.sources.data_files import (
    LOOKUP_THREADS,
    DataFile,
    derive_dataset_name,
    digest_listing,
    is_remote_url,
    open_seekable,
)
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.limits import (
    MAX_IMAGE_BYTES,
    MAX_NAME_CHARACTERS,
    require_short_class_name,
    require_storable_classes,
)
from sfm.pipeline.sources.sample import Sample, describe_oversized_image
from sfm.pipeline.sources.source import NO_SAMPLES, Shard, Source, Split, compute_digest
from sfm.pipeline.sources.spec_options import parse_options, require_known_options
from sfm.pipeline.sources.split_files import find_split_files
from sfm.stats_store.class_lists import class_id_from
from sfm.text import format_names, sanitize_line, summarize_error
from sfm.untrusted_files import MAX_JSON_BYTES, parse_json

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MIN_SHARD_ROWS = 1024
LABEL_PROBE_ROWS = 64
LABEL_BATCH_ROWS = 16_384
LABEL_THREADS = 4
MAX_THRIFT_STRING_BYTES = MAX_JSON_BYTES
"""Of a text in the description of a table, such as the metadata that name classes."""

MAX_THRIFT_ITEMS = 1_000_000
"""Of things in a list there, such as row groups."""


@dataclass(frozen=True)
class ImageColumns:
    """What the schema of a dataset says.

    Attributes
    ----------
    image, label : str
        Names of the columns.
    names : list of str or None
        What the label numbers 0, 1, … mean, as the dataset's own metadata name them.
    """

    image: str
    label: str
    names: list[str] | None


@dataclass(frozen=True)
class ParquetTable:
    """A file of a dataset.

    Attributes
    ----------
    rows : tuple of int
        Rows of each row group.
    labels : tuple of str or None
        Class id of every row; None where it would take long to find out, on another machine.
    written : frozenset of (str, str)
        Class ids, and how their labels are written.
    text_numbers : bool
        Whether a label is text of digits.
    """

    file: DataFile
    rows: tuple[int, ...]
    labels: tuple[str, ...] | None
    written: frozenset[tuple[str, str]] = frozenset()
    text_numbers: bool = False


def open_parquet_source(text: str) -> Source:
    """Open a dataset of parquet files.

    Parameters
    ----------
    text : str
        A folder, prefix or pattern of files that tell their split in their names, or
        ``PATTERN?test=PATTERN``; of a folder, ``train=NAME`` and ``test=NAME`` choose the splits.
        ``image=COLUMN`` and ``label=COLUMN`` name the columns; with ``names=FILE`` the class list in FILE
        says what the label numbers mean, if the dataset does not.

    Raises
    ------
    InputError
        If pyarrow is not installed, files are missing or damaged, or have no such columns.
    """
    spec = f"parquet:{text}"
    place, options = parse_options(text)
    require_known_options(spec, options, ("train", "test", "image", "label", "names"))
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f'{spec} needs pyarrow, which is not installed: pip install "sfm-distill[parquet]"')
    found = find_split_files(place, (".parquet",), options.get("train"), options.get("test"))
    train = found.train
    with open_table(train[0]) as first:
        columns = find_columns(first.schema_arrow, train[0].url, options.get("image"), options.get("label"))
        notes = (
            [] if "names" in options else note_unusable_metadata(first.schema_arrow, train[0].url, columns)
        )
    found = found.labelled(lambda file: table_has_labels(file, columns.label))
    test = found.test
    names, shown = label_list_from_metadata(columns, train[0].url)
    if "names" in options:
        names = read_class_list(options["names"])
        shown = {class_id: names.names.get(class_id, class_id) for class_id in names.ids}
    near = not any(is_remote_url(file.url) for file in (*train, *test))
    # On a disk labels are read, too, whose pages may be of any size.
    with ThreadPoolExecutor(LABEL_THREADS if near else LOOKUP_THREADS) as pool:
        tables = list(pool.map(lambda file: inspect_table(file, columns, names, near), [*train, *test]))
    require_consistent_labels(spec, (pair for table in tables for pair in table.written))
    ids: list[str] | None = None
    if near:
        ids = sorted({label for table in tables for label in table.labels or ()})
    elif shown:
        ids = sorted(names.ids if names else shown)
    return Source(
        name=derive_dataset_name(place, ".parquet"),
        spec=spec,
        class_ids=ids,
        class_names=None if ids is None else [shown.get(class_id, class_id) for class_id in ids],
        train=make_parquet_split(tables[: len(train)], columns, names, ids),
        test=make_parquet_split(tables[len(train) :], columns, names, ids) if test else NO_SAMPLES,
        decode=decode_image,
        inventory=replace(found.inventory, notes=(*found.inventory.notes, *notes)),
    )


def table_has_labels(file: DataFile, column: str) -> bool:
    """Say whether the first rows of a file have labels; -1 is none."""
    with open_table(file, [column]) as table:
        if column not in table.schema_arrow.names:
            return False
        labels = itertools.islice(iter_stored_labels(table, file, column), LABEL_PROBE_ROWS)
        return any(label not in (None, -1, "-1") for label in labels)


def inspect_table(file: DataFile, columns: ImageColumns, names: ClassList | None, near: bool) -> ParquetTable:
    """Read the size of a file and, if it is near, its labels.

    Raises
    ------
    InputError
        If it lacks a column, numbers its classes otherwise than others, or has labels out of range; names it.
    """
    with open_table(file, [columns.label]) as table:
        absent = {columns.image, columns.label} - set(table.schema_arrow.names)
        if absent:
            raise InputError(f"{file.url} has no column {' and '.join(sorted(absent))}, unlike other files")
        if find_columns(table.schema_arrow, file.url, columns.image, columns.label).names != columns.names:
            raise InputError(
                f"{file.url} names its classes otherwise than the first training file: join them"
            )
        rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        if not near:
            return ParquetTable(file, tuple(rows), None)
        ids: dict[tuple[type, object], str] = {}
        labels = []
        for row, label in enumerate(iter_stored_labels(table, file, columns.label)):
            key = type(label), label
            if key not in ids:
                ids[key] = class_id_from_cell(label, names, f"row {row} of {file.url}")
            labels.append(ids[key])
    if len(labels) != sum(rows):
        raise InputError(f"{file.url} is damaged: it has {len(labels):,} labels for {sum(rows):,} rows")
    written = frozenset((class_id, format_numeric_label(label)) for (_, label), class_id in ids.items())
    text_numbers = any(isinstance(label, str) and format_numeric_label(label) for _, label in ids)
    return ParquetTable(file, tuple(rows), tuple(labels), written, text_numbers)


def iter_stored_labels(
    table: "pyarrow.parquet.ParquetFile", file: DataFile, column: str
) -> Iterator[str | int | float | None]:
    """Yield the labels of a file that was opened for their column; each text is in memory once.

    Raises
    ------
    InputError
        If the column holds neither numbers nor text, or text that is longer than any label.
    """
    import pyarrow
    import pyarrow.compute

    row = 0
    for batch in table.iter_batches(LABEL_BATCH_ROWS, columns=[column], use_threads=False):
        labels = batch.column(column)
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


def class_id_from_cell(label: object, names: ClassList | None, where: str) -> str:
    """Return the class id that a row's label means: without names, text is the id itself, digits or not.

    Raises
    ------
    InputError
        See :func:`class_id_from_label`.
    """
    if names is None and isinstance(label, str) and label.strip():
        return class_id_from(require_short_class_name(label.strip(), where))
    return class_id_from_label(label, names, where)


def make_parquet_split(
    tables: Sequence[ParquetTable],
    columns: ImageColumns,
    names: ClassList | None,
    class_ids: list[str] | None,
) -> Split:
    """Describe a split; shards are neighbouring row groups."""
    index = {class_id: c for c, class_id in enumerate(class_ids or ())}

    def shard(table: ParquetTable, groups: range) -> Shard:
        start, end = sum(table.rows[: groups.start]), sum(table.rows[: groups.stop])

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            found = iter_table_samples(table.file, groups, start, columns, names)
            return found if positions is None else take_positions(found, positions)

        labels = None
        if table.labels is not None:
            labels = np.array([index[label] for label in table.labels[start:end]], dtype=np.int32)
        return Shard(f"rows {start} to {end - 1} of {table.file.url}", labels, read)

    meaning = encode_label_list(names)
    # Text of digits used to be taken for numbers: what was extracted so is not the same.
    if names is None and any(table.text_numbers for table in tables):
        meaning = "text is an id"
    return Split(
        tuple(shard(table, groups) for table in tables for groups in merge_row_groups(table.rows)),
        compute_digest(
            digest_listing([table.file for table in tables]), columns.image, columns.label, meaning
        ),
    )


@contextlib.contextmanager
def open_table(file: DataFile, repeating: Sequence[str] = ()) -> "Iterator[pyarrow.parquet.ParquetFile]":
    """Open a parquet file.

    Parameters
    ----------
    file : DataFile
    repeating : sequence of str
        Paths of columns whose values, where they repeat, are to be in memory once.

    Raises
    ------
    InputError
        If it cannot be read, what it holds is damaged, or it promises more than it may hold; names it.
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
        require_plausible_rows(metadata, file)
        with pyarrow.parquet.ParquetFile(
            content,
            metadata=metadata,
            buffer_size=1 << 20,
            read_dictionary=[path for path in list_binary_columns(metadata) if path in repeating],
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
        line = sanitize_line(summarize_error(error), 300)
        raise InputError(f"{file.url} is damaged, truncated or no parquet file: {line}") from error
    finally:
        handle.close()


def list_binary_columns(metadata: "pyarrow.parquet.FileMetaData") -> list[str]:
    """Return the paths of the columns of bytes and of text."""
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def require_plausible_rows(metadata: "pyarrow.parquet.FileMetaData", file: DataFile) -> None:
    """Refuse a file that promises more rows than it has bytes, however often images repeat.

    Raises
    ------
    InputError
        Names it.
    """
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if any(count < 0 for count in rows) or sum(rows) != metadata.num_rows or sum(rows) > file.size:
        raise InputError(
            f"{file.url} is damaged: it promises {metadata.num_rows:,} rows in {file.size:,} bytes"
        )


def find_columns(schema: "pyarrow.Schema", where: str, image: str | None, label: str | None) -> ImageColumns:
    """Find the columns of images and labels.

    Parameters
    ----------
    image, label : str or None
        The user's choice; otherwise the columns of that name, or else the only ones of that kind in the
        dataset's metadata.

    Raises
    ------
    InputError
        If there are none, or several; lists the columns.
    """
    features = parse_hub_features(schema)
    found = {}
    for role, wanted, kind in (("image", image, "Image"), ("label", label, "ClassLabel")):
        of_kind = [name for name, feature in features.items() if feature.get("_type") == kind]
        name = wanted or (role if role in schema.names else of_kind[0] if len(of_kind) == 1 else None)
        if name is None or name not in schema.names:
            raise InputError(
                f"{where} has no {role} column{f' {name}' if name else ''}: choose one with ?{role}=NAME; "
                f"there are {format_names(schema.names, 20)}"
            )
        found[role] = name
    twice = [name for name in found.values() if schema.names.count(name) > 1]
    if twice:
        raise InputError(f"{where} has several columns {twice[0]}: rename them")
    return ImageColumns(found["image"], found["label"], parse_class_names(features.get(found["label"], {})))


def parse_hub_features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """Return what the datasets library wrote into a schema about its columns, if it did.

    Whatever else another program wrote in its place says nothing about columns.
    """
    try:
        described = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    for name in ("info", "features"):
        described = described.get(name) if isinstance(described, dict) else None
    if not isinstance(described, dict):
        return {}
    return {name: feature for name, feature in described.items() if isinstance(feature, dict)}


def parse_class_names(feature: dict[str, Any]) -> list[str] | None:
    """Return the class names in what the datasets library says about a column; None unless it is a list."""
    names = feature.get("names")
    usable = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
    return list(names) if usable and isinstance(names, list) else None


def note_unusable_metadata(schema: "pyarrow.Schema", where: str, columns: ImageColumns) -> list[str]:
    """Say so, if metadata that should name the classes of a dataset cannot be used."""
    features = parse_hub_features(schema)
    foreign = b"huggingface" in (schema.metadata or {}) and not features
    nameless = features.get(columns.label, {}).get("_type") == "ClassLabel" and columns.names is None
    if not (foreign or nameless):
        return []
    return [
        f"the metadata of {where} names no classes that can be read: labels stand for themselves; give "
        f"?names=LIST to name them"
    ]


def label_list_from_metadata(columns: ImageColumns, where: str) -> tuple[ClassList | None, dict[str, str]]:
    """Return what a dataset's own metadata make of label numbers: class ids, and display names by class id.

    Names that a person would take for one cannot tell classes apart; such classes are numbered.
    """
    if columns.names is None:
        return None, {}
    require_storable_classes(columns.names, None, f"the metadata of {where}")
    if len({normalize_class_name(name) for name in columns.names}) == len(columns.names):
        return ClassList(where, [class_id_from(name) for name in columns.names], {}), {}
    return None, {class_id_from_number(label): name for label, name in enumerate(columns.names)}


def merge_row_groups(rows: Sequence[int]) -> list[range]:
    """Join neighbouring row groups until they hold enough rows to be worth a shard.

    Parameters
    ----------
    rows : sequence of int
        Rows of each row group.
    """
    shards, start, held = [], 0, 0
    for group, count in enumerate(rows):
        held += count
        if held >= MIN_SHARD_ROWS or group == len(rows) - 1:
            shards.append(range(start, group + 1))
            start, held = group + 1, 0
    return shards


def iter_table_samples(
    file: DataFile, groups: range, start: int, columns: ImageColumns, names: ClassList | None
) -> Iterator[Sample]:
    """Stream the rows of neighbouring row groups, the first of which is row `start`.

    Raises
    ------
    InputError
        If the file is damaged, or a row lacks its image or its label; names it.
    """
    row = start
    with open_table(file) as table:
        require_image_column(table, file, columns.image)
        # One row at a time takes 8 us more each, and any of them may be large.
        for batch in table.iter_batches(
            1, list(groups), columns=[columns.image, columns.label], use_threads=False
        ):
            images, labels = batch.column(columns.image), batch.column(columns.label)
            for image, label in zip(images, labels, strict=True):
                where = f"row {row} of {file.url}"
                stored = label.as_py()
                class_id = class_id_from_cell(stored, names, where)
                data, fault = extract_image_bytes(image.as_py(), where), ""
                if len(data) > MAX_IMAGE_BYTES:
                    data, fault = b"", describe_oversized_image(len(data))
                yield Sample(data, class_id, where, format_numeric_label(stored), fault)
                row += 1


def require_image_column(table: "pyarrow.parquet.ParquetFile", file: DataFile, column: str) -> None:
    """Refuse a column of lists and the like, which no image is encoded in.

    Raises
    ------
    InputError
        Names the file.
    """
    import pyarrow

    kind = table.schema_arrow.field(column).type
    parts = [field.type for field in kind] if pyarrow.types.is_struct(kind) else [kind]
    if any(pyarrow.types.is_nested(part) for part in parts):
        raise InputError(
            f"{file.url} holds no encoded image in {column}: found {sanitize_line(str(kind), 60)}; embed "
            f"the image files in the table"
        )


def extract_image_bytes(cell: object, where: str) -> bytes:
    """Return the encoded image that a cell holds.

    Raises
    ------
    InputError
        If it holds none; names it.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        return data
    path = cell.get("path") if isinstance(cell, dict) else None
    found = f"only the path {path}" if path else "nothing" if data is None else type(data).__name__
    raise InputError(f"{where} holds no encoded image: found {found}; embed the image files in the table")
