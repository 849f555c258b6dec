"""``wds:PATTERN``: WebDataset tar shards, streamed from a disk, a web server or a bucket."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.class_labels import (
    ClassList,
    class_id_from_label,
    encode_label_list,
    format_numeric_label,
    read_class_list,
)
from sfm.pipeline.sources.class_subsets import take_positions
from sfm.pipeline.sources.data_files import DataFile, derive_dataset_name, digest_listing
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.inventory import IMAGE_EXTENSIONS
from sfm.pipeline.sources.limits import MAX_LABEL_BYTES
from sfm.pipeline.sources.sample import Sample, describe_oversized_image
from sfm.pipeline.sources.source import NO_SAMPLES, Shard, Source, Split, compute_digest
from sfm.pipeline.sources.spec_options import parse_options, require_known_options
from sfm.pipeline.sources.split_files import find_split_files
from sfm.pipeline.sources.tar_members import Content, NoLabelError, iter_sample_parts
from sfm.untrusted_files import parse_json

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
UNSUPPORTED_SUFFIXES = (".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
JSON_LABEL_KEYS = ("label", "cls")


def open_wds_source(text: str) -> Source:
    """Open tar shards.

    Parameters
    ----------
    text : str
        ``PATTERN?test=PATTERN``, or a folder or prefix of shards that tell their split in their names, of
        which ``train=NAME`` and ``test=NAME`` choose others than the usual. With ``names=FILE`` the class
        list in FILE says what the label numbers mean.

    Raises
    ------
    InputError
        If shards are missing, or the splits cannot be told apart.
    """
    spec = f"wds:{text}"
    place, options = parse_options(text)
    require_known_options(spec, options, ("train", "test", "names"))
    names = read_class_list(options["names"]) if "names" in options else None
    found = find_split_files(
        place, (*TAR_SUFFIXES, *UNSUPPORTED_SUFFIXES), options.get("train"), options.get("test")
    )
    found = found.labelled(shard_has_labels)
    require_distinct_shards([*found.train, *found.test])
    ids = sorted(names.ids) if names else None
    return Source(
        name=derive_dataset_name(place, (*TAR_SUFFIXES, *UNSUPPORTED_SUFFIXES)),
        spec=spec,
        class_ids=ids,
        class_names=[names.names.get(class_id, class_id) for class_id in ids] if names and ids else None,
        train=make_wds_split(found.train, names),
        test=make_wds_split(found.test, names) if found.test else NO_SAMPLES,
        decode=decode_image,
        inventory=found.inventory,
    )


def shard_has_labels(file: DataFile) -> bool:
    """Say whether the first sample of a shard has a label; -1 is none.

    A shard that cannot be read is not without labels: it is named when it is read.
    """
    try:
        key, parts = next(iter_sample_parts(file, Counter()), ("", {}))
        _, label = find_stored_label(parts, f"{key} in {file.url}")
    except NoLabelError:
        return False
    except InputError:
        return True
    return str(label).strip() != "-1"


def require_distinct_shards(files: Sequence[DataFile]) -> None:
    """Refuse shards that cannot be unpacked here, and those that are there packed and unpacked.

    Raises
    ------
    InputError
        Names them.
    """
    by_stem: dict[str, DataFile] = {}
    for file in files:
        if file.url.endswith(UNSUPPORTED_SUFFIXES):
            raise InputError(f"{file.url} is compressed with something else than gzip: unpack it")
        stem = file.url.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
        other = by_stem.setdefault(stem, file)
        if other is not file:
            raise InputError(f"{other.url} and {file.url} are one shard, most likely: remove one of the two")


def make_wds_split(files: Sequence[DataFile], names: ClassList | None) -> Split:
    """Describe a split; one shard per file."""

    def shard(file: DataFile) -> Shard:
        unused: Counter[str] = Counter()

        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            found = iter_shard_samples(file, names, unused)
            return found if positions is None else take_positions(found, positions)

        return Shard(file.url, None, read, unused)

    return Split(tuple(map(shard, files)), compute_digest(digest_listing(files), encode_label_list(names)))


def iter_shard_samples(file: DataFile, names: ClassList | None, unused: Counter[str]) -> Iterator[Sample]:
    """Stream the samples of a shard.

    Parameters
    ----------
    unused : Counter
        Gets anew the members that are part of no sample, by kind.

    Raises
    ------
    InputError
        If the shard is damaged, or a sample lacks an image or a label, or has two; names it.
    """
    unused.clear()
    for key, parts in iter_sample_parts(file, unused):
        where = f"{key} in {file.url}"
        image = next(extension for extension in parts if extension in IMAGE_EXTENSIONS)
        read_from, label = find_stored_label(parts, where)
        unused.update(f".{extension}" for extension in parts if extension not in (image, read_from))
        data = parts[image]
        data, fault = (data, "") if isinstance(data, bytes) else (b"", describe_oversized_image(data))
        yield Sample(
            data, class_id_from_label(label, names, where), where, format_numeric_label(label), fault
        )


def find_stored_label(parts: Mapping[str, Content], where: str) -> tuple[str, object]:
    """Return the label of a sample, as it is written, and the extension of the member that holds it.

    Raises
    ------
    InputError
        If there is none (:class:`NoLabelError`), or it cannot be read.
    """
    texts = {end: part for end, part in parts.items() if isinstance(part, bytes)}
    try:
        if "cls" in texts:
            return "cls", texts["cls"].decode()
        if "json" in texts:
            described = parse_json(texts["json"], MAX_LABEL_BYTES)
            if isinstance(described, dict):
                found = next((described[name] for name in JSON_LABEL_KEYS if name in described), None)
                if found is not None:
                    return "json", found
        if "txt" in texts:
            return "txt", texts["txt"].decode()
    except ValueError as error:
        raise InputError(f"{where} has a label that cannot be read: {error}") from error
    raise NoLabelError(f"{where} has no label: expected a .cls, a .txt, or {JSON_LABEL_KEYS[0]!r} in a .json")
