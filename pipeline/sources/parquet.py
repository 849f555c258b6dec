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
    ParsedClassList,
    class_id_from_label,
    format_class_list_for_digest,
    format_numeric_label_or_empty,
    read_class_list,
    require_one_spelling_per_class,
)
from sfm.pipeline.sources.class_subsets import take_ascending_positions
from sfm.pipeline.sources.data_files import (
    LOOKUP_THREADS,
    DataFile,
    derive_dataset_name_from_folder_part,
    digest_file_states,
    is_remote_url,
)
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.limits import MAX_IMAGE_BYTES, require_short_class_name
from sfm.pipeline.sources.parquet_reader import (
    extract_image_bytes,
    iter_stored_labels,
    open_parquet_file,
    require_unnested_image_column,
)
from sfm.pipeline.sources.parquet_schema import (
    ImageAndLabelColumns,
    find_image_and_label_columns,
    list_notes_on_unusable_class_names,
    make_class_list_or_display_names,
)
from sfm.pipeline.sources.sample import Sample, describe_oversized_image_fault
from sfm.pipeline.sources.source import NO_SAMPLES, Shard, Source, Split, compute_digest
from sfm.pipeline.sources.spec_options import require_known_options, split_location_and_options
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
    rows_per_group : tuple of int
        Rows of each row group.
    row_class_ids : tuple of str or None
        Class id of every row; None if the file is on another machine, where reading labels takes long.
    class_ids_and_label_texts : frozenset of (str, str)
        Class ids, and the texts of their labels; see `format_numeric_label_or_empty`.
    has_digit_text_labels : bool
        Whether a label is text of digits.
    """

    file: DataFile
    rows_per_group: tuple[int, ...]
    row_class_ids: tuple[str, ...] | None
    class_ids_and_label_texts: frozenset[tuple[str, str]] = frozenset()
    has_digit_text_labels: bool = False


def open_parquet_source(place_with_options: str) -> Source:
    """Open a dataset of parquet files.

    Parameters
    ----------
    place_with_options : str
        A folder, prefix or pattern of files with split names, or ``PATTERN?test=PATTERN``. Of a
        folder, ``train=NAME`` and ``test=NAME`` choose the splits. ``image=COLUMN`` and ``label=COLUMN`` name
        the columns. With ``names=FILE`` the class list in FILE names the label numbers, if the
        dataset does not.

    Raises
    ------
    InputError
        If pyarrow is not installed, files are missing or damaged, or have no such columns.
    """
    spec = f"parquet:{place_with_options}"
    path_or_pattern, options = split_location_and_options(place_with_options)
    require_known_options(spec, options, ("train", "test", "image", "label", "names"))
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f'{spec} needs pyarrow, which is not installed: pip install "sfm-distill[parquet]"')
    files = find_split_files(path_or_pattern, (".parquet",), options.get("train"), options.get("test"))
    first_url = files.train[0].url
    with open_parquet_file(files.train[0]) as table:
        schema = table.schema_arrow
        columns = find_image_and_label_columns(schema, first_url, options.get("image"), options.get("label"))
        notes = [] if "names" in options else list_notes_on_unusable_class_names(schema, first_url, columns)
    files = files.replace_unlabelled_test_by_val_or_none(
        lambda file: first_rows_have_labels(file, columns.label_column)
    )
    class_list, display_names = make_class_list_or_display_names(columns, first_url)
    if "names" in options:
        class_list = read_class_list(options["names"])
        display_names = {
            class_id: class_list.display_names.get(class_id, class_id) for class_id in class_list.class_ids
        }
    is_local = not any(is_remote_url(file.url) for file in (*files.train, *files.test))
    # On a disk labels are read, too; their pages may be of any size, so few are read at the same time.
    with ThreadPoolExecutor(LABEL_THREADS if is_local else LOOKUP_THREADS) as pool:
        train, test = (
            list(pool.map(lambda file: read_parquet_table_info(file, columns, class_list, is_local), split))
            for split in (files.train, files.test)
        )
    require_one_spelling_per_class(
        spec, (pair for table in (*train, *test) for pair in table.class_ids_and_label_texts)
    )
    ids: list[str] | None = None
    if is_local:
        ids = sorted({class_id for table in (*train, *test) for class_id in table.row_class_ids or ()})
    elif display_names:
        ids = sorted(class_list.class_ids if class_list else display_names)
    return Source(
        name=derive_dataset_name_from_folder_part(path_or_pattern, ".parquet"),
        spec=spec,
        class_ids=ids,
        class_names=None if ids is None else [display_names.get(class_id, class_id) for class_id in ids],
        train=make_parquet_split(train, columns, class_list, ids),
        test=make_parquet_split(test, columns, class_list, ids) if test else NO_SAMPLES,
        decode=decode_image,
        inventory=replace(files.inventory, notes=(*files.inventory.notes, *notes)),
    )


def first_rows_have_labels(file: DataFile, label_column: str) -> bool:
    """Return whether a label column has labels in the first rows of a file; -1 is none."""
    with open_parquet_file(file, [label_column]) as table:
        if label_column not in table.schema_arrow.names:
            return False
        labels = itertools.islice(iter_stored_labels(table, file, label_column), LABEL_PROBE_ROWS)
        return any(label not in (None, -1, "-1") for label in labels)


def read_parquet_table_info(
    file: DataFile, columns: ImageAndLabelColumns, class_list: ParsedClassList | None, read_labels: bool
) -> ParquetTable:
    """Return the row counts of a file and, if asked to, its labels.

    Raises
    ------
    InputError
        If it lacks a column, names other classes than other files, or has labels out of range.
    """
    with open_parquet_file(file, [columns.label_column]) as table:
        absent = {columns.image_column, columns.label_column} - set(table.schema_arrow.names)
        if absent:
            raise InputError(f"{file.url} has no column {' and '.join(sorted(absent))}, unlike other files")
        own_columns = find_image_and_label_columns(
            table.schema_arrow, file.url, columns.image_column, columns.label_column
        )
        if own_columns.class_names != columns.class_names:
            raise InputError(f"{file.url} has other class names than the first training file: merge them")
        rows_per_group = tuple(table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))
        if not read_labels:
            return ParquetTable(file, rows_per_group, None)
        id_by_label: dict[tuple[type, object], str] = {}
        class_ids = []
        for row, label in enumerate(iter_stored_labels(table, file, columns.label_column)):
            key = type(label), label
            if key not in id_by_label:
                id_by_label[key] = class_id_from_parquet_label(label, class_list, f"row {row} of {file.url}")
            class_ids.append(id_by_label[key])
    if len(class_ids) != sum(rows_per_group):
        raise InputError(
            f"{file.url} is damaged: it has {len(class_ids):,} labels for {sum(rows_per_group):,} rows"
        )
    return ParquetTable(
        file,
        rows_per_group,
        tuple(class_ids),
        frozenset(
            (class_id, format_numeric_label_or_empty(label)) for (_, label), class_id in id_by_label.items()
        ),
        any(isinstance(label, str) and format_numeric_label_or_empty(label) for _, label in id_by_label),
    )


def class_id_from_parquet_label(
    stored_label: object, class_list: ParsedClassList | None, location: str
) -> str:
    """Return the class id of a row's label; without a list, text is the id itself, digits or not.

    Raises
    ------
    InputError
        See :func:`class_id_from_label`.
    """
    if class_list is None and isinstance(stored_label, str) and stored_label.strip():
        return normalize_class_id(require_short_class_name(stored_label.strip(), location))
    return class_id_from_label(stored_label, class_list, location)


def make_parquet_split(
    tables: Sequence[ParquetTable],
    columns: ImageAndLabelColumns,
    class_list: ParsedClassList | None,
    class_ids: list[str] | None,
) -> Split:
    """Return the split of some tables; a shard is a few neighbouring row groups."""
    label_by_id = {class_id: label for label, class_id in enumerate(class_ids or ())}

    def make_shard(table: ParquetTable, groups: range) -> Shard:
        start, stop = sum(table.rows_per_group[: groups.start]), sum(table.rows_per_group[: groups.stop])

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            samples = iter_row_group_samples(table.file, groups, start, columns, class_list)
            return samples if positions is None else take_ascending_positions(samples, positions)

        labels = None
        if table.row_class_ids is not None:
            labels = np.array(
                [label_by_id[class_id] for class_id in table.row_class_ids[start:stop]], np.int32
            )
        return Shard(f"rows {start} to {stop - 1} of {table.file.url}", labels, read)

    meaning = format_class_list_for_digest(class_list)
    # Earlier versions read text of digits as numbers, so their entries differ.
    if class_list is None and any(table.has_digit_text_labels for table in tables):
        meaning = "text is an id"
    files_digest = digest_file_states([table.file for table in tables])
    return Split(
        tuple(
            make_shard(table, groups)
            for table in tables
            for groups in merge_row_groups_into_shard_ranges(table.rows_per_group)
        ),
        compute_digest(files_digest, columns.image_column, columns.label_column, meaning),
    )


def merge_row_groups_into_shard_ranges(rows_per_group: Sequence[int]) -> list[range]:
    """Return ranges of neighbouring row groups, each of ``MIN_SHARD_ROWS`` rows or more but the last.

    Parameters
    ----------
    rows_per_group : sequence of int
        Rows of each row group.
    """
    ranges, start, row_count = [], 0, 0
    for group, count in enumerate(rows_per_group):
        row_count += count
        if row_count >= MIN_SHARD_ROWS or group == len(rows_per_group) - 1:
            ranges.append(range(start, group + 1))
            start, row_count = group + 1, 0
    return ranges


def iter_row_group_samples(
    file: DataFile,
    row_groups: range,
    first_row: int,
    columns: ImageAndLabelColumns,
    class_list: ParsedClassList | None,
) -> Iterator[Sample]:
    """Yield the samples of neighbouring row groups, which begin at `first_row` of the file.

    Raises
    ------
    InputError
        If the file is damaged, or a row lacks its image or its label; names it.
    """
    row = first_row
    with open_parquet_file(file) as table:
        require_unnested_image_column(table, file, columns.image_column)
        # Batches of one row take 8 us more per row; a row may be large, and a batch is in memory at once.
        for batch in table.iter_batches(
            1, list(row_groups), columns=[columns.image_column, columns.label_column], use_threads=False
        ):
            images, labels = batch.column(columns.image_column), batch.column(columns.label_column)
            for image, cell in zip(images, labels, strict=True):
                location = f"row {row} of {file.url}"
                label = cell.as_py()
                class_id = class_id_from_parquet_label(label, class_list, location)
                data, fault = extract_image_bytes(image.as_py(), location), ""
                if len(data) > MAX_IMAGE_BYTES:
                    data, fault = b"", describe_oversized_image_fault(len(data))
                yield Sample(data, class_id, location, format_numeric_label_or_empty(label), fault)
                row += 1
