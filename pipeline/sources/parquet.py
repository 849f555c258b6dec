"""``parquet:PATTERN``: image datasets as the Hugging Face hub holds them, from disks, servers or buckets."""

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.class_labels import (
    ClassList,
    class_id_from_label,
    encode_label_list,
    format_numeric_label,
    read_class_list,
    require_consistent_labels,
)
from sfm.pipeline.sources.class_subsets import take_positions
from sfm.pipeline.sources.data_files import (
    LOOKUP_THREADS,
    DataFile,
    derive_dataset_name,
    digest_file_states,
    is_remote_url,
)
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.limits import MAX_IMAGE_BYTES, require_short_class_name
from sfm.pipeline.sources.parquet_reader import (
    extract_image_bytes,
    iter_stored_labels,
    open_table,
    require_image_column,
)
from sfm.pipeline.sources.parquet_schema import (
    ImageColumns,
    find_columns,
    label_list_from_metadata,
    note_unusable_metadata,
)
from sfm.pipeline.sources.sample import Sample, describe_oversized_image
from sfm.pipeline.sources.source import NO_SAMPLES, Shard, Source, Split, compute_digest
from sfm.pipeline.sources.spec_options import parse_spec_options, require_known_options
from sfm.pipeline.sources.split_files import find_split_files
from sfm.stats_store.class_lists import normalize_class_id

MIN_SHARD_ROWS = 1024
LABEL_PROBE_ROWS = 64
LABEL_THREADS = 4


@dataclass(frozen=True)
class ParquetTable:
    """A file of a dataset, with its labels.

    Attributes
    ----------
    group_rows : tuple of int
        Rows of each row group.
    class_ids : tuple of str or None
        Class id of every row; None if the file is on another machine, where reading labels takes long.
    label_texts : frozenset of (str, str)
        Class ids, and the texts of their labels; see `format_numeric_label`.
    has_text_numbers : bool
        Whether a label is text of digits.
    """

    file: DataFile
    group_rows: tuple[int, ...]
    class_ids: tuple[str, ...] | None
    label_texts: frozenset[tuple[str, str]] = frozenset()
    has_text_numbers: bool = False


def open_parquet_source(location: str) -> Source:
    """Open a dataset of parquet files.

    Parameters
    ----------
    location : str
        A folder, prefix or pattern of files with split names, or ``PATTERN?test=PATTERN``. Of a
        folder, ``train=NAME`` and ``test=NAME`` choose the splits. ``image=COLUMN`` and ``label=COLUMN`` name
        the columns. With ``names=FILE`` the class list in FILE names the label numbers, if the
        dataset does not.

    Raises
    ------
    InputError
        If pyarrow is not installed, files are missing or damaged, or have no such columns.
    """
    spec = f"parquet:{location}"
    path_or_pattern, options = parse_spec_options(location)
    require_known_options(spec, options, ("train", "test", "image", "label", "names"))
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f'{spec} needs pyarrow, which is not installed: pip install "sfm-distill[parquet]"')
    files = find_split_files(path_or_pattern, (".parquet",), options.get("train"), options.get("test"))
    first_url = files.train[0].url
    with open_table(files.train[0]) as table:
        schema = table.schema_arrow
        columns = find_columns(schema, first_url, options.get("image"), options.get("label"))
        notes = [] if "names" in options else note_unusable_metadata(schema, first_url, columns)
    files = files.replace_unlabelled_test(lambda file: table_has_labels(file, columns.label))
    label_list, display_names = label_list_from_metadata(columns, first_url)
    if "names" in options:
        label_list = read_class_list(options["names"])
        display_names = {class_id: label_list.names.get(class_id, class_id) for class_id in label_list.ids}
    is_local = not any(is_remote_url(file.url) for file in (*files.train, *files.test))
    # On a disk labels are read, too; their pages may be of any size, so few are read at the same time.
    with ThreadPoolExecutor(LABEL_THREADS if is_local else LOOKUP_THREADS) as pool:
        train, test = (
            list(pool.map(lambda file: inspect_table(file, columns, label_list, is_local), split))
            for split in (files.train, files.test)
        )
    require_consistent_labels(spec, (pair for table in (*train, *test) for pair in table.label_texts))
    ids: list[str] | None = None
    if is_local:
        ids = sorted({class_id for table in (*train, *test) for class_id in table.class_ids or ()})
    elif display_names:
        ids = sorted(label_list.ids if label_list else display_names)
    return Source(
        name=derive_dataset_name(path_or_pattern, ".parquet"),
        spec=spec,
        class_ids=ids,
        class_names=None if ids is None else [display_names.get(class_id, class_id) for class_id in ids],
        train=make_parquet_split(train, columns, label_list, ids),
        test=make_parquet_split(test, columns, label_list, ids) if test else NO_SAMPLES,
        decode=decode_image,
        inventory=replace(files.inventory, notes=(*files.inventory.notes, *notes)),
    )


def table_has_labels(file: DataFile, column: str) -> bool:
    """Return whether a label column has labels in the first rows of a file; -1 is none."""
    with open_table(file, [column]) as table:
        if column not in table.schema_arrow.names:
            return False
        labels = itertools.islice(iter_stored_labels(table, file, column), LABEL_PROBE_ROWS)
        return any(label not in (None, -1, "-1") for label in labels)


def inspect_table(
    file: DataFile, columns: ImageColumns, label_list: ClassList | None, read_labels: bool
) -> ParquetTable:
    """Return the row counts of a file and, if asked to, its labels.

    Raises
    ------
    InputError
        If it lacks a column, names other classes than other files, or has labels out of range.
    """
    with open_table(file, [columns.label]) as table:
        absent = {columns.image, columns.label} - set(table.schema_arrow.names)
        if absent:
            raise InputError(f"{file.url} has no column {' and '.join(sorted(absent))}, unlike other files")
        own_columns = find_columns(table.schema_arrow, file.url, columns.image, columns.label)
        if own_columns.class_names != columns.class_names:
            raise InputError(f"{file.url} has other class names than the first training file: merge them")
        group_rows = tuple(table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))
        if not read_labels:
            return ParquetTable(file, group_rows, None)
        id_by_label: dict[tuple[type, object], str] = {}
        class_ids = []
        for row, label in enumerate(iter_stored_labels(table, file, columns.label)):
            key = type(label), label
            if key not in id_by_label:
                id_by_label[key] = class_id_from_cell(label, label_list, f"row {row} of {file.url}")
            class_ids.append(id_by_label[key])
    if len(class_ids) != sum(group_rows):
        raise InputError(
            f"{file.url} is damaged: it has {len(class_ids):,} labels for {sum(group_rows):,} rows"
        )
    return ParquetTable(
        file,
        group_rows,
        tuple(class_ids),
        frozenset((class_id, format_numeric_label(label)) for (_, label), class_id in id_by_label.items()),
        any(isinstance(label, str) and format_numeric_label(label) for _, label in id_by_label),
    )


def class_id_from_cell(label: object, label_list: ClassList | None, location: str) -> str:
    """Return the class id of a row's label; without a list, text is the id itself, digits or not.

    Raises
    ------
    InputError
        See :func:`class_id_from_label`.
    """
    if label_list is None and isinstance(label, str) and label.strip():
        return normalize_class_id(require_short_class_name(label.strip(), location))
    return class_id_from_label(label, label_list, location)


def make_parquet_split(
    tables: Sequence[ParquetTable],
    columns: ImageColumns,
    label_list: ClassList | None,
    class_ids: list[str] | None,
) -> Split:
    """Return the split of some tables; a shard is a few neighbouring row groups."""
    label_by_id = {class_id: label for label, class_id in enumerate(class_ids or ())}

    def make_shard(table: ParquetTable, groups: range) -> Shard:
        start, stop = sum(table.group_rows[: groups.start]), sum(table.group_rows[: groups.stop])

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            samples = iter_table_samples(table.file, groups, start, columns, label_list)
            return samples if positions is None else take_positions(samples, positions)

        labels = None
        if table.class_ids is not None:
            labels = np.array([label_by_id[class_id] for class_id in table.class_ids[start:stop]], np.int32)
        return Shard(f"rows {start} to {stop - 1} of {table.file.url}", labels, read)

    meaning = encode_label_list(label_list)
    # Earlier versions read text of digits as numbers, so their entries differ.
    if label_list is None and any(table.has_text_numbers for table in tables):
        meaning = "text is an id"
    files_digest = digest_file_states([table.file for table in tables])
    return Split(
        tuple(make_shard(table, groups) for table in tables for groups in merge_row_groups(table.group_rows)),
        compute_digest(files_digest, columns.image, columns.label, meaning),
    )


def merge_row_groups(group_rows: Sequence[int]) -> list[range]:
    """Return ranges of neighbouring row groups, each of ``MIN_SHARD_ROWS`` rows or more but the last.

    Parameters
    ----------
    group_rows : sequence of int
        Rows of each row group.
    """
    ranges, start, row_count = [], 0, 0
    for group, count in enumerate(group_rows):
        row_count += count
        if row_count >= MIN_SHARD_ROWS or group == len(group_rows) - 1:
            ranges.append(range(start, group + 1))
            start, row_count = group + 1, 0
    return ranges


def iter_table_samples(
    file: DataFile, groups: range, first_row: int, columns: ImageColumns, label_list: ClassList | None
) -> Iterator[Sample]:
    """Yield the samples of neighbouring row groups, which begin at `first_row` of the file.

    Raises
    ------
    InputError
        If the file is damaged, or a row lacks its image or its label; names it.
    """
    row = first_row
    with open_table(file) as table:
        require_image_column(table, file, columns.image)
        # Batches of one row take 8 us more per row; a row may be large, and a batch is in memory at once.
        for batch in table.iter_batches(
            1, list(groups), columns=[columns.image, columns.label], use_threads=False
        ):
            images, labels = batch.column(columns.image), batch.column(columns.label)
            for image, cell in zip(images, labels, strict=True):
                location = f"row {row} of {file.url}"
                label = cell.as_py()
                class_id = class_id_from_cell(label, label_list, location)
                data, fault = extract_image_bytes(image.as_py(), location), ""
                if len(data) > MAX_IMAGE_BYTES:
                    data, fault = b"", describe_oversized_image(len(data))
                yield Sample(data, class_id, location, format_numeric_label(label), fault)
                row += 1
