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
from sfm.pipeline.sources.classes import (
    ClassList,
    label_id,
    meaning_of,
    normalised,
    number_id,
    read_class_list,
    require_one_writing,
    written_number,
)
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.limits import (
    IMAGE_BYTES,
    NAME_CHARACTERS,
    require_listable,
    require_short_name,
)
from sfm.pipeline.sources.options import require_known, split_options
from sfm.pipeline.sources.places import (
    LOOKUPS,
    DataFile,
    dataset_name,
    is_remote,
    listing_of,
    open_seekable,
)
from sfm.pipeline.sources.source import (
    NO_SAMPLES,
    Sample,
    Shard,
    Source,
    Split,
    at,
    digest_of,
    some,
    too_large,
)
from sfm.pipeline.sources.splits import split_files
from sfm.stats_store.class_lists import normalize_class_id
from sfm.text import first_line, one_line
from sfm.untrusted import JSON_BYTES, parse_json

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

ROWS_PER_SHARD = 1024
FIRST_ROWS = 64
LABELS_AT_ONCE = 16_384
LABEL_READERS = 4
STRING_BYTES = JSON_BYTES
"""Of a text in the description of a table, such as the metadata that name classes."""

CONTAINERS = 1_000_000
"""Of things in a list there, such as row groups."""


@dataclass(frozen=True)
class Columns:
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
class Table:
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


def parquet_source(text: str) -> Source:
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
    place, options = split_options(text)
    require_known(spec, options, ("train", "test", "image", "label", "names"))
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f'{spec} needs pyarrow, which is not installed: pip install "sfm-distill[parquet]"')
    found = split_files(place, (".parquet",), options.get("train"), options.get("test"))
    train = found.train
    with opened(train[0]) as first:
        columns = columns_of(first.schema_arrow, train[0].url, options.get("image"), options.get("label"))
        notes = [] if "names" in options else metadata_notes(first.schema_arrow, train[0].url, columns)
    found = found.labelled(lambda file: has_labels(file, columns.label))
    test = found.test
    names, shown = own_names(columns, train[0].url)
    if "names" in options:
        names = read_class_list(options["names"])
        shown = {class_id: names.names.get(class_id, class_id) for class_id in names.ids}
    near = not any(is_remote(file.url) for file in (*train, *test))
    # On a disk labels are read, too, whose pages may be of any size.
    with ThreadPoolExecutor(LABEL_READERS if near else LOOKUPS) as pool:
        tables = list(pool.map(lambda file: describe(file, columns, names, near), [*train, *test]))
    require_one_writing(spec, (pair for table in tables for pair in table.written))
    ids: list[str] | None = None
    if near:
        ids = sorted({label for table in tables for label in table.labels or ()})
    elif shown:
        ids = sorted(names.ids if names else shown)
    return Source(
        name=dataset_name(place, ".parquet"),
        spec=spec,
        class_ids=ids,
        class_names=None if ids is None else [shown.get(class_id, class_id) for class_id in ids],
        train=parquet_split(tables[: len(train)], columns, names, ids),
        test=parquet_split(tables[len(train) :], columns, names, ids) if test else NO_SAMPLES,
        decode=decode_image,
        inventory=replace(found.inventory, notes=(*found.inventory.notes, *notes)),
    )


def has_labels(file: DataFile, column: str) -> bool:
    """Say whether the first rows of a file have labels; -1 is none."""
    with opened(file, [column]) as table:
        if column not in table.schema_arrow.names:
            return False
        labels = itertools.islice(stored_labels(table, file, column), FIRST_ROWS)
        return any(label not in (None, -1, "-1") for label in labels)


def describe(file: DataFile, columns: Columns, names: ClassList | None, near: bool) -> Table:
    """Read the size of a file and, if it is near, its labels.

    Raises
    ------
    InputError
        If it lacks a column, numbers its classes otherwise than others, or has labels out of range; names it.
    """
    with opened(file, [columns.label]) as table:
        absent = {columns.image, columns.label} - set(table.schema_arrow.names)
        if absent:
            raise InputError(f"{file.url} has no column {' and '.join(sorted(absent))}, unlike other files")
        if columns_of(table.schema_arrow, file.url, columns.image, columns.label).names != columns.names:
            raise InputError(
                f"{file.url} names its classes otherwise than the first training file: join them"
            )
        rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        if not near:
            return Table(file, tuple(rows), None)
        ids: dict[tuple[type, object], str] = {}
        labels = []
        for row, label in enumerate(stored_labels(table, file, columns.label)):
            key = type(label), label
            if key not in ids:
                ids[key] = row_label(label, names, f"row {row} of {file.url}")
            labels.append(ids[key])
    if len(labels) != sum(rows):
        raise InputError(f"{file.url} is damaged: it has {len(labels):,} labels for {sum(rows):,} rows")
    written = frozenset((class_id, written_number(label)) for (_, label), class_id in ids.items())
    text_numbers = any(isinstance(label, str) and written_number(label) for _, label in ids)
    return Table(file, tuple(rows), tuple(labels), written, text_numbers)


def stored_labels(
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
    for batch in table.iter_batches(LABELS_AT_ONCE, columns=[column], use_threads=False):
        labels = batch.column(column)
        kind = labels.type.value_type if isinstance(labels, pyarrow.DictionaryArray) else labels.type
        if pyarrow.types.is_nested(kind):
            raise InputError(f"row {row} of {file.url} has no usable label: found {one_line(str(kind), 60)}")
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            texts = labels.dictionary if isinstance(labels, pyarrow.DictionaryArray) else labels
            longest = pyarrow.compute.max(pyarrow.compute.utf8_length(texts)).as_py() or 0
            if longest > NAME_CHARACTERS:
                raise InputError(
                    f"{file.url} has, from row {row} on, a class name of {longest:,} characters: at most "
                    f"{NAME_CHARACTERS:,} are read"
                )
        row += len(labels)
        yield from labels.to_pylist()


def row_label(label: object, names: ClassList | None, where: str) -> str:
    """Return the class id that a row's label means: without names, text is the id itself, digits or not.

    Raises
    ------
    InputError
        See :func:`label_id`.
    """
    if names is None and isinstance(label, str) and label.strip():
        return normalize_class_id(require_short_name(label.strip(), where))
    return label_id(label, names, where)


def parquet_split(
    tables: Sequence[Table], columns: Columns, names: ClassList | None, class_ids: list[str] | None
) -> Split:
    """Describe a split; shards are neighbouring row groups."""
    index = {class_id: c for c, class_id in enumerate(class_ids or ())}

    def shard(table: Table, groups: range) -> Shard:
        start, end = sum(table.rows[: groups.start]), sum(table.rows[: groups.stop])

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            found = samples(table.file, groups, start, columns, names)
            return found if positions is None else at(found, positions)

        labels = None
        if table.labels is not None:
            labels = np.array([index[label] for label in table.labels[start:end]], dtype=np.int32)
        return Shard(f"rows {start} to {end - 1} of {table.file.url}", labels, read)

    meaning = meaning_of(names)
    # Text of digits used to be taken for numbers: what was extracted so is not the same.
    if names is None and any(table.text_numbers for table in tables):
        meaning = "text is an id"
    return Split(
        tuple(shard(table, groups) for table in tables for groups in row_groups(table.rows)),
        digest_of(listing_of([table.file for table in tables]), columns.image, columns.label, meaning),
    )


@contextlib.contextmanager
def opened(file: DataFile, repeating: Sequence[str] = ()) -> "Iterator[pyarrow.parquet.ParquetFile]":
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
            content, thrift_string_size_limit=STRING_BYTES, thrift_container_size_limit=CONTAINERS
        ).metadata
        require_possible(metadata, file)
        with pyarrow.parquet.ParquetFile(
            content,
            metadata=metadata,
            buffer_size=1 << 20,
            read_dictionary=[path for path in text_columns(metadata) if path in repeating],
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
        line = one_line(first_line(error), 300)
        raise InputError(f"{file.url} is damaged, truncated or no parquet file: {line}") from error
    finally:
        handle.close()


def text_columns(metadata: "pyarrow.parquet.FileMetaData") -> list[str]:
    """Return the paths of the columns of bytes and of text."""
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def require_possible(metadata: "pyarrow.parquet.FileMetaData", file: DataFile) -> None:
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


def columns_of(schema: "pyarrow.Schema", where: str, image: str | None, label: str | None) -> Columns:
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
    features = features_of(schema)
    found = {}
    for role, wanted, kind in (("image", image, "Image"), ("label", label, "ClassLabel")):
        of_kind = [name for name, feature in features.items() if feature.get("_type") == kind]
        name = wanted or (role if role in schema.names else of_kind[0] if len(of_kind) == 1 else None)
        if name is None or name not in schema.names:
            raise InputError(
                f"{where} has no {role} column{f' {name}' if name else ''}: choose one with ?{role}=NAME; "
                f"there are {some(schema.names, 20)}"
            )
        found[role] = name
    twice = [name for name in found.values() if schema.names.count(name) > 1]
    if twice:
        raise InputError(f"{where} has several columns {twice[0]}: rename them")
    return Columns(found["image"], found["label"], class_names_of(features.get(found["label"], {})))


def features_of(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
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


def class_names_of(feature: dict[str, Any]) -> list[str] | None:
    """Return the class names in what the datasets library says about a column; None unless it is a list."""
    names = feature.get("names")
    usable = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
    return list(names) if usable and isinstance(names, list) else None


def metadata_notes(schema: "pyarrow.Schema", where: str, columns: Columns) -> list[str]:
    """Say so, if metadata that should name the classes of a dataset cannot be used."""
    features = features_of(schema)
    foreign = b"huggingface" in (schema.metadata or {}) and not features
    nameless = features.get(columns.label, {}).get("_type") == "ClassLabel" and columns.names is None
    if not (foreign or nameless):
        return []
    return [
        f"the metadata of {where} names no classes that can be read: labels stand for themselves; give "
        f"?names=LIST to name them"
    ]


def own_names(columns: Columns, where: str) -> tuple[ClassList | None, dict[str, str]]:
    """Return what a dataset's own metadata make of label numbers: class ids, and display names by class id.

    Names that a person would take for one cannot tell classes apart; such classes are numbered.
    """
    if columns.names is None:
        return None, {}
    require_listable(columns.names, None, f"the metadata of {where}")
    if len({normalised(name) for name in columns.names}) == len(columns.names):
        return ClassList(where, [normalize_class_id(name) for name in columns.names], {}), {}
    return None, {number_id(label): name for label, name in enumerate(columns.names)}


def row_groups(rows: Sequence[int]) -> list[range]:
    """Join neighbouring row groups until they hold enough rows to be worth a shard.

    Parameters
    ----------
    rows : sequence of int
        Rows of each row group.
    """
    shards, start, held = [], 0, 0
    for group, count in enumerate(rows):
        held += count
        if held >= ROWS_PER_SHARD or group == len(rows) - 1:
            shards.append(range(start, group + 1))
            start, held = group + 1, 0
    return shards


def samples(
    file: DataFile, groups: range, start: int, columns: Columns, names: ClassList | None
) -> Iterator[Sample]:
    """Stream the rows of neighbouring row groups, the first of which is row `start`.

    Raises
    ------
    InputError
        If the file is damaged, or a row lacks its image or its label; names it.
    """
    row = start
    with opened(file) as table:
        require_encoded(table, file, columns.image)
        # One row at a time takes 8 us more each, and any of them may be large.
        for batch in table.iter_batches(
            1, list(groups), columns=[columns.image, columns.label], use_threads=False
        ):
            images, labels = batch.column(columns.image), batch.column(columns.label)
            for image, label in zip(images, labels, strict=True):
                where = f"row {row} of {file.url}"
                stored = label.as_py()
                class_id = row_label(stored, names, where)
                data, fault = image_bytes(image.as_py(), where), ""
                if len(data) > IMAGE_BYTES:
                    data, fault = b"", too_large(len(data))
                yield Sample(data, class_id, where, written_number(stored), fault)
                row += 1


def require_encoded(table: "pyarrow.parquet.ParquetFile", file: DataFile, column: str) -> None:
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
            f"{file.url} holds no encoded image in {column}: found {one_line(str(kind), 60)}; embed "
            f"the image files in the table"
        )


def image_bytes(cell: object, where: str) -> bytes:
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
