"""The members of a tar shard, streamed, compressed with gzip or not; and which of them make up a sample."""

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import DataFile, open_stream
from sfm.pipeline.sources.inventory import (
    HIDDEN_KIND,
    IMAGE_EXTENSIONS,
    SPECIAL_FILE_KIND,
    get_extension,
    get_unused_kind,
)
from sfm.pipeline.sources.limits import (
    MAX_BATCH_BYTES,
    MAX_GROUP_BYTES,
    MAX_HEADER_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    MAX_MEMBERS,
    MAX_PATH_CHARACTERS,
)
from sfm.text import format_names, sanitize_line, summarize_error

LABEL_EXTENSIONS = ("cls", "json", "txt")
GZIP_MAGIC = b"\x1f\x8b"
UNSUPPORTED_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
CHUNK_BYTES = 1 << 20
TAR_READ_ERRORS = (
    tarfile.TarError,
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
    ValueError,
    RecursionError,
    OverflowError,
)
"""How tarfile and gzip fail on damaged files, and on some that were made to harm."""

Content = bytes | int
"""Of an image or a label; of an image that is too large to be read, its size."""

MAX_EMPTY_READS = 64
"""Reads that find nothing more, after which a shard counts as cut off; tarfile makes a few at the end."""

MAX_HELD_SAMPLES = 16
"""Samples with dotted names that are held back, in case that they turn out to be parts of one sample."""


class NoLabelError(InputError):
    """A sample has an image, but no label."""


@dataclass
class MemberGroup:
    """Neighbouring members that share the name up to the first dot.

    Attributes
    ----------
    key : str
        That name.
    parts : dict of str to Content
        Images and labels, by what follows the first dot.
    dotted : dict of str to dict
        Images and labels with more dots: by their name up to the last dot, then by what follows.
    others : list of str
        Names of members that are neither.
    size : int
        Bytes of images and labels.
    """

    key: str
    parts: dict[str, Content] = field(default_factory=dict)
    dotted: dict[str, dict[str, Content]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, stem: str, end: str, content: Content, where: str) -> None:
        """Take a member in.

        Raises
        ------
        InputError
            If there is one of that name, or they are too large together.
        """
        parts = self.parts if stem == self.key else self.dotted.setdefault(stem, {})
        if end in parts:
            raise InputError(f"{where} twice")
        self.size += len(content) if isinstance(content, bytes) else 0
        if self.size > MAX_GROUP_BYTES:
            raise InputError(
                f"{where} and others of its name, of more than {MAX_GROUP_BYTES:,} bytes together"
            )
        parts[end] = content

    def names(self) -> str:
        """Return what the members' names end in, as text."""
        ends = [f".{end}" for end in self.parts]
        ends += [
            f"{stem.removeprefix(self.key)}.{end}" for stem, parts in self.dotted.items() for end in parts
        ]
        ends += [name.removeprefix(self.key) for name in self.others]
        return format_names(ends) if len(ends) != 1 else f"only {ends[0]}"


class MeteredStream:
    """A stream that tarfile reads no further than it may: headers can be of any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._place = 0
        self._reads_at_end = 0
        self.most = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Read on.

        Raises
        ------
        tarfile.ReadError
            If more than `most` bytes would have been read, or there is nothing more, again and again: tarfile
            goes on for as many bytes as a header claims.
        """
        if self._place > self.most:
            raise tarfile.ReadError(f"what it says about a member is longer than {MAX_HEADER_BYTES:,} bytes")
        data = self._stream.read(size)
        self._place += len(data)
        self._reads_at_end += not data
        if self._reads_at_end > MAX_EMPTY_READS:
            raise tarfile.ReadError("it ends within a member")
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """Python's tarfile takes a damaged header, or none, for the end of an archive: here they are errors."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without the mark of its end") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def decompress_stream(stream: BinaryIO, where: str) -> BinaryIO:
    """Return a stream of what a stream holds once it is unpacked: itself, if gzip has not compressed it.

    Raises
    ------
    InputError
        If it is compressed otherwise.
    """
    start = stream.peek(8)[:8]  # type: ignore[attr-defined]
    other = next((name for magic, name in UNSUPPORTED_COMPRESSION.items() if start.startswith(magic)), None)
    if other:
        raise InputError(f"{where} is compressed with {other}: unpack it, or compress it with gzip instead")
    return cast("BinaryIO", gzip.GzipFile(fileobj=stream)) if start.startswith(GZIP_MAGIC) else stream


def read_to_end(stream: BinaryIO) -> None:
    """Read what gzip has behind the archive: its checksum is there."""
    while isinstance(stream, gzip.GzipFile) and stream.read(CHUNK_BYTES):
        pass


def iter_members(file: DataFile, unused: Counter[str]) -> Iterator[tuple[str, Content | None]]:
    """Stream the members of a shard.

    Parameters
    ----------
    unused : Counter
        Gets the members that no sample can hold, by kind.

    Yields
    ------
    str, Content or None
        Name and content of a member, in the order of the archive; only one is in memory. None for the
        content of what is neither image nor label.

    Raises
    ------
    InputError
        If the shard is not there, is not a whole tar archive, holds links or sparse files in place of images,
        or what is larger than any dataset holds.
    """
    with open_stream(file) as stream:
        try:
            content = decompress_stream(stream, file.url)
            metered = MeteredStream(content)
            with tarfile.open(
                fileobj=cast("BinaryIO", metered), mode="r|", tarinfo=_StrictTarInfo, bufsize=CHUNK_BYTES
            ) as archive:
                count = 0
                while (info := read_next_header(archive, metered)) is not None:
                    count += 1
                    if count > MAX_MEMBERS:
                        raise InputError(
                            f"{file.url} has more than {MAX_MEMBERS:,} members: cut it into several"
                        )
                    if can_be_part_of_sample(file, info, unused):
                        yield info.name, read_member(file, archive, info)
            read_to_end(content)
        except InputError:
            raise
        except TAR_READ_ERRORS as error:
            raise InputError(
                f"{file.url} is damaged, truncated or no tar archive: {summarize_error(error)}; "
                "write it again"
            ) from error


def read_next_header(archive: tarfile.TarFile, metered: MeteredStream) -> tarfile.TarInfo | None:
    """Return the header of the next member; None at the end.

    Raises
    ------
    tarfile.ReadError
        If headers are longer than any.
    """
    # Up to there are contents, which are skipped piece by piece; what follows is held until it is understood.
    metered.most = archive.offset + MAX_HEADER_BYTES
    info = archive.next()
    # tarfile would remember every member, to find it again.
    archive.members.clear()  # type: ignore[attr-defined]
    if info is not None:
        metered.most = archive.offset + MAX_HEADER_BYTES
        named = info.isdir() or PurePosixPath(info.name).name
        if info.size < 0 or not named or len(info.name) > MAX_PATH_CHARACTERS:
            raise tarfile.ReadError(
                f"a member of {info.size} bytes has a name of {len(info.name)} characters"
            )
    if sum(len(name) + len(text) for name, text in archive.pax_headers.items()) > MAX_HEADER_BYTES:
        raise tarfile.ReadError(f"what it says about all members is longer than {MAX_HEADER_BYTES:,} bytes")
    return info


def read_member(file: DataFile, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Content | None:
    """Return the content of a member that is an image or a label, and None for others.

    Raises
    ------
    InputError
        If it is sparse, or a label that is longer than any; names it.
    """
    extension = get_extension(info.name)
    if extension not in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS):
        return None
    where = f"{sanitize_line(info.name)} in {file.url}"
    if info.issparse():
        raise InputError(f"{where} is a sparse file: write the shard without tar --sparse")
    if extension in LABEL_EXTENSIONS and info.size > MAX_LABEL_BYTES:
        raise InputError(
            f"{where} has {info.size:,} bytes: labels and captions of {MAX_LABEL_BYTES:,} are read"
        )
    if info.size > MAX_IMAGE_BYTES:
        return info.size
    body = archive.extractfile(info)
    return body.read() if body else None


def can_be_part_of_sample(file: DataFile, info: tarfile.TarInfo, unused: Counter[str]) -> bool:
    """Say whether a member may be part of a sample; count those that cannot be, by kind.

    Raises
    ------
    InputError
        If it is a link in place of an image or a label: a stream cannot go back to what it stands for.
    """
    if info.isdir():
        return False
    if PurePosixPath(info.name).name.startswith("."):
        kind = HIDDEN_KIND
    elif info.name.startswith("__"):
        kind = "about the shard (__*)"
    elif info.isreg():
        return True
    elif not (info.islnk() or info.issym()):
        kind = SPECIAL_FILE_KIND
    elif get_extension(info.name) in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS):
        raise InputError(
            f"{info.name} in {file.url} is a link to {info.linkname}: write the shard with the files "
            f"themselves (tar --dereference --hard-dereference)"
        )
    else:
        kind = "links"
    unused[kind] += 1
    return False


def parse_member_name(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and what follows the first dot, in small letters."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)), extension.lower()


def iter_sample_parts(file: DataFile, unused: Counter[str]) -> Iterator[tuple[str, dict[str, Content]]]:
    """Stream the samples of a shard: each a key, and its images and labels by extension.

    Neighbouring members that share the name up to the first dot are one sample, as WebDataset has it; members
    with more dots are further parts of it. Where there is nothing but such, as in ``0_img.003.png`` beside
    ``0_img.003.cls``, names are cut at the last dot.

    Raises
    ------
    InputError
        If the shard is damaged, or an image or a label cannot be paired; names it.
    """
    group: MemberGroup | None = None
    streamed = False
    for name, content in iter_members(file, unused):
        key, extension = parse_member_name(name)
        if group is None or key != group.key:
            yield from () if group is None else iter_group_samples(group, file, unused, streamed)
            group, streamed = MemberGroup(key), False
        if content is None:
            group.others.append(name)
            continue
        stem, end = (
            (key, extension) if "." not in extension else (name[: name.rindex(".")], get_extension(name))
        )
        held_back = len(group.dotted) == MAX_HELD_SAMPLES or group.size > MAX_BATCH_BYTES
        if stem != key and stem not in group.dotted and group.dotted and held_back:
            yield from iter_dotted_samples(group, file)
            group.dotted.clear()
            group.size = 0
            streamed = True
        group.add(stem, end, content, f"{file.url} holds {name}")
    if group is not None:
        yield from iter_group_samples(group, file, unused, streamed)


def iter_group_samples(
    group: MemberGroup, file: DataFile, unused: Counter[str], streamed: bool
) -> Iterator[tuple[str, dict[str, Content]]]:
    """Yield what a group of members makes: one sample, or as many as there are dotted names.

    Parameters
    ----------
    streamed : bool
        Whether some of its dotted names were taken for samples before.

    Raises
    ------
    InputError
        If it has a label but no image, or an image but no label; names it.
    """
    unused.update(get_unused_kind(name) for name in group.others)
    if not group.parts:
        # Captions and metadata that go with no image are no samples.
        for stem in [
            stem for stem, parts in group.dotted.items() if not {"cls", *IMAGE_EXTENSIONS} & parts.keys()
        ]:
            unused.update(f".{end}" for end in group.dotted.pop(stem))
        yield from iter_dotted_samples(group, file)
        return
    if streamed:
        raise InputError(
            f"{group.key} in {file.url} has an image or label of its own beside many with more dots in their "
            f"names: cannot tell which belong together; rename them without dots"
        )
    images = [end for end in group.parts if end in IMAGE_EXTENSIONS]
    if len(images) != 1:
        found = " and ".join(f".{image}" for image in images) or group.names()
        hint = "" if images else f": name the image {PurePosixPath(group.key).name}.EXTENSION"
        raise InputError(f"{group.key} in {file.url} must have one image, found {found}{hint}")
    for stem, parts in group.dotted.items():
        unused.update(f"{stem.removeprefix(group.key)}.{end}".lower() for end in parts)
    yield group.key, group.parts


def iter_dotted_samples(group: MemberGroup, file: DataFile) -> Iterator[tuple[str, dict[str, Content]]]:
    """Yield the samples of members whose names are cut at the last dot.

    Raises
    ------
    InputError
        If one lacks an image or a label (:class:`NoLabelError`); names it.
    """
    for stem, parts in group.dotted.items():
        images = [end for end in parts if end in IMAGE_EXTENSIONS]
        if len(images) != 1 or len(parts) == len(images):
            kind = NoLabelError if len(images) == 1 else InputError
            raise kind(
                f"{stem}.{next(iter(parts))} in {file.url} cannot be paired: beside an image there must be a "
                f"label of the same name (.{', .'.join(LABEL_EXTENSIONS)}); found {group.names()}"
            )
        yield stem, parts
