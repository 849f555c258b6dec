"""``wds:PATTERN``: WebDataset tar shards, streamed from a disk, a web server or a bucket."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.class_labels import (
    ParsedClassList,
    class_id_from_label,
    format_class_list_for_digest,
    format_numeric_label_or_empty,
    read_class_list,
)
from sfm.pipeline.sources.class_subsets import take_ascending_positions
from sfm.pipeline.sources.data_files import DataFile, derive_dataset_name_from_folder_part, digest_file_states
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.inventory import IMAGE_EXTENSIONS
from sfm.pipeline.sources.limits import MAX_LABEL_BYTES
from sfm.pipeline.sources.sample import Sample, describe_oversized_image_fault
from sfm.pipeline.sources.source import NO_SAMPLES, Shard, Source, Split, compute_digest
from sfm.pipeline.sources.spec_options import require_known_options, split_location_and_options
from sfm.pipeline.sources.split_files import find_split_files
from sfm.pipeline.sources.tar_members import ContentOrSize
from sfm.pipeline.sources.tar_samples import MissingLabelError, iter_tar_samples
from sfm.untrusted_files import parse_json

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
UNSUPPORTED_SUFFIXES = (".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
JSON_LABEL_KEYS = ("label", "cls")


def open_wds_source(place_with_options: str) -> Source:
    """Open a dataset of tar shards.

    Parameters
    ----------
    place_with_options : str
        ``PATTERN?test=PATTERN``, or a folder or prefix of shards with split names; of a folder,
        ``train=NAME`` and ``test=NAME`` choose the splits. With ``names=FILE`` the class list in FILE says
        what the label numbers mean.

    Raises
    ------
    InputError
        If shards are missing, or the splits are ambiguous.
    """
    spec = f"wds:{place_with_options}"
    path_or_pattern, options = split_location_and_options(place_with_options)
    require_known_options(spec, options, ("train", "test", "names"))
    class_list = read_class_list(options["names"]) if "names" in options else None
    suffixes = (*TAR_SUFFIXES, *UNSUPPORTED_SUFFIXES)
    files = find_split_files(path_or_pattern, suffixes, options.get("train"), options.get("test"))
    files = files.replace_unlabelled_test_by_val_or_none(first_sample_has_label)
    require_readable_distinct_shards([*files.train, *files.test])
    ids = sorted(class_list.class_ids) if class_list else None
    return Source(
        name=derive_dataset_name_from_folder_part(path_or_pattern, suffixes),
        spec=spec,
        class_ids=ids,
        class_names=[class_list.display_names.get(i, i) for i in ids] if class_list and ids else None,
        train=make_wds_split(files.train, class_list),
        test=make_wds_split(files.test, class_list) if files.test else NO_SAMPLES,
        decode=decode_image,
        inventory=files.inventory,
    )


def first_sample_has_label(file: DataFile) -> bool:
    """Return whether the first sample of a shard has a label; -1 is none.

    True for a shard that cannot be read: the error is raised when it is read.
    """
    try:
        key, contents = next(iter_tar_samples(file, Counter()), ("", {}))
        _, label = find_label_extension_and_value(contents, f"{key} in {file.url}")
    except MissingLabelError:
        return False
    except InputError:
        return True
    return str(label).strip() != "-1"


def require_readable_distinct_shards(files: Sequence[DataFile]) -> None:
    """Refuse unsupported compression, and shards that exist both packed and unpacked.

    Raises
    ------
    InputError
        With the names of the shards.
    """
    file_by_stem: dict[str, DataFile] = {}
    for file in files:
        if file.url.endswith(UNSUPPORTED_SUFFIXES):
            raise InputError(f"{file.url} is compressed with something else than gzip: unpack it")
        stem = file.url.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
        other = file_by_stem.setdefault(stem, file)
        if other is not file:
            raise InputError(f"{other.url} and {file.url} are one shard, most likely: remove one of the two")


def make_wds_split(files: Sequence[DataFile], class_list: ParsedClassList | None) -> Split:
    """Return the split of some tar files, one shard each."""

    def make_shard(file: DataFile) -> Shard:
        unused: Counter[str] = Counter()

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            samples = iter_shard_samples(file, class_list, unused)
            return samples if positions is None else take_ascending_positions(samples, positions)

        return Shard(file.url, None, read, unused)

    listing_digest = compute_digest(digest_file_states(files), format_class_list_for_digest(class_list))
    return Split(tuple(map(make_shard, files)), listing_digest)


def iter_shard_samples(
    file: DataFile, class_list: ParsedClassList | None, unused_by_kind: Counter[str]
) -> Iterator[Sample]:
    """Yield the samples of a tar file as it is streamed.

    Parameters
    ----------
    unused_by_kind : Counter
        Cleared first; counts the members that are part of no sample, by kind.

    Raises
    ------
    InputError
        If the shard is damaged, or a sample lacks an image or a label, or has two; names it.
    """
    unused_by_kind.clear()
    for key, contents in iter_tar_samples(file, unused_by_kind):
        location = f"{key} in {file.url}"
        image_extension = next(extension for extension in contents if extension in IMAGE_EXTENSIONS)
        label_extension, label = find_label_extension_and_value(contents, location)
        used = (image_extension, label_extension)
        unused_by_kind.update(f".{extension}" for extension in contents if extension not in used)
        image = contents[image_extension]
        data, fault = (
            (image, "") if isinstance(image, bytes) else (b"", describe_oversized_image_fault(image))
        )
        class_id = class_id_from_label(label, class_list, location)
        yield Sample(data, class_id, location, format_numeric_label_or_empty(label), fault)


def find_label_extension_and_value(
    contents_by_extension: Mapping[str, ContentOrSize], location: str
) -> tuple[str, object]:
    """Return the extension of the member that holds a sample's label, and the label as it is stored.

    Raises
    ------
    InputError
        If there is no label (:class:`MissingLabelError`), or it cannot be read.
    """
    texts = {
        extension: content
        for extension, content in contents_by_extension.items()
        if isinstance(content, bytes)
    }
    try:
        if "cls" in texts:
            return "cls", texts["cls"].decode()
        if "json" in texts:
            description = parse_json(texts["json"], MAX_LABEL_BYTES)
            if isinstance(description, dict):
                label = next((description[key] for key in JSON_LABEL_KEYS if key in description), None)
                if label is not None:
                    return "json", label
        if "txt" in texts:
            return "txt", texts["txt"].decode()
    except ValueError as error:
        raise InputError(f"{location} has a label that cannot be read: {error}") from error
    raise MissingLabelError(
        f"{location} has no label: expected a .cls, a .txt, or {JSON_LABEL_KEYS[0]!r} in a .json"
    )
