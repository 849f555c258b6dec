"""``wds:PATTERN``: WebDataset tar shards, streamed from a disk, a web server or a bucket."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from sfm.errors import InputError
from sfm.pipeline.sources.classes import ClassList, label_id, meaning_of, read_class_list, written_number
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.options import require_known, split_options
from sfm.pipeline.sources.places import DataFile, dataset_name, listing_of, open_stream, split_files
from sfm.pipeline.sources.source import Sample, Shard, Source, Split, at, digest_of

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "jp2", "ppm", "pgm")
LABELS = ("cls", "json", "txt")
JSON_KEYS = ("label", "cls")


def wds_source(text: str) -> Source:
    """Open tar shards.

    Parameters
    ----------
    text : str
        ``PATTERN?test=PATTERN``, or a folder or prefix of shards that tell their split in their names. With
        ``names=FILE`` the class list in FILE says what the label numbers mean.

    Raises
    ------
    InputError
        If shards are missing, or the splits cannot be told apart.
    """
    spec = f"wds:{text}"
    place, options = split_options(text)
    require_known(spec, options, ("test", "names"))
    names = read_class_list(options["names"]) if "names" in options else None
    train, test = split_files(place, options.get("test"), ".tar")
    ids = sorted(names.ids) if names else None
    return Source(
        name=dataset_name(place, ".tar"),
        spec=spec,
        class_ids=ids,
        class_names=[names.names.get(class_id, class_id) for class_id in ids] if names and ids else None,
        train=wds_split(train, names),
        test=wds_split(test, names),
        decode=decode_image,
    )


def wds_split(files: Sequence[DataFile], names: ClassList | None) -> Split:
    """Describe a split; one shard per file."""

    def shard(file: DataFile) -> Shard:
        def read(positions: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
            found = samples(file, names)
            return found if positions is None else at(found, positions)

        return Shard(file.url, None, read)

    return Split(tuple(map(shard, files)), digest_of(listing_of(files), meaning_of(names)))


class _Header(tarfile.TarInfo):
    """Python's tarfile takes a damaged header, or none, for the end of an archive: here they are errors."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without the mark of its end") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def members(file: DataFile) -> Iterator[tuple[str, bytes]]:
    """Stream the images and labels of a shard.

    Yields
    ------
    str, bytes
        Name and content of a member, in the order of the archive; only one is in memory.

    Raises
    ------
    InputError
        If the shard is not there, or is not a whole tar archive; names it.
    """
    with open_stream(file) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, bufsize=1 << 20) as archive:
                while (info := archive.next()) is not None:
                    # tarfile would remember every member, to find it again.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if info.isreg() and is_part(info.name):
                        content = archive.extractfile(info)
                        assert content is not None
                        yield info.name, content.read()
        except tarfile.TarError as error:
            raise InputError(
                f"{file.url} is damaged, truncated or no tar archive: {error}; write it again"
            ) from error


def is_part(name: str) -> bool:
    """Say whether a member is an image or a label; names that begin with ``__`` describe the shard."""
    return not name.startswith("__") and key_of(name)[1] in (*IMAGES, *LABELS)


def key_of(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and what follows the first dot, in small letters."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else "", extension.lower()


def samples(file: DataFile, names: ClassList | None) -> Iterator[Sample]:
    """Stream the samples of a shard: neighbouring members with one key.

    Raises
    ------
    InputError
        If the shard is damaged, or a sample lacks an image or a label, or has two; names it.
    """
    key, parts = "", dict[str, bytes]()
    for name, content in members(file):
        own, extension = key_of(name)
        if own != key:
            if parts:
                yield sample(file, key, parts, names)
            key, parts = own, {}
        if extension in parts:
            raise InputError(f"{file.url} holds {name} twice")
        parts[extension] = content
    if parts:
        yield sample(file, key, parts, names)


def sample(file: DataFile, key: str, parts: dict[str, bytes], names: ClassList | None) -> Sample:
    """Put the members of one sample together."""
    where = f"{key} in {file.url}"
    images = [extension for extension in parts if extension in IMAGES]
    if len(images) != 1:
        found = " and ".join(images) or f"only .{' and .'.join(parts)}"
        raise InputError(f"{where} must have one image, found {found}")
    label = stored_label(parts, where)
    return Sample(parts[images[0]], label_id(label, names, where), where, written_number(label))


def stored_label(parts: dict[str, bytes], where: str) -> object:
    """Return the label of a sample, as it is written.

    Raises
    ------
    InputError
        If there is none, or it cannot be read.
    """
    try:
        if "cls" in parts:
            return parts["cls"].decode()
        if "json" in parts:
            described = json.loads(parts["json"])
            if isinstance(described, dict):
                found = next((described[name] for name in JSON_KEYS if name in described), None)
                if found is not None:
                    return found
        if "txt" in parts:
            return parts["txt"].decode()
    except ValueError as error:
        raise InputError(f"{where} has a label that cannot be read: {error}") from error
    raise InputError(f"{where} has no label: expected a .cls, a .txt, or {JSON_KEYS[0]!r} in a .json")
