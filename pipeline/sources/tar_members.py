"""Stream the members of a tar shard, compressed with gzip or not, within bounded memory."""

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import DataFile, open_stream
from sfm.pipeline.sources.inventory import (
    HIDDEN_KIND,
    IMAGE_EXTENSIONS,
    SPECIAL_FILE_KIND,
    get_dotless_lowercase_extension,
)
from sfm.pipeline.sources.limits import (
    MAX_HEADER_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    MAX_MEMBERS,
    MAX_PATH_CHARACTERS,
)
from sfm.text import get_first_error_line, sanitize_line

LABEL_EXTENSIONS = ("cls", "json", "txt")
GZIP_MAGIC = b"\x1f\x8b"
UNSUPPORTED_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
TAR_BUFFER_BYTES = 1 << 20
TAR_READ_ERRORS = (
    tarfile.TarError,
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
    ValueError,
    RecursionError,
    OverflowError,
)
"""Errors of tarfile and gzip on damaged and malicious files."""

ContentOrSize = bytes | int
"""Bytes of an image or a label; for an image that is too large to read, its size."""

MAX_EMPTY_READS = 64
"""Maximum number of reads without data, of which tarfile makes a few at the end; more mean truncation."""


class PositionLimitedStream:
    """A stream that refuses to be read beyond `max_position`, because headers can have any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._empty_reads = 0
        self.max_position = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Return the next bytes.

        Raises
        ------
        tarfile.ReadError
            If the position is beyond `max_position`, or too many reads brought no data: tarfile keeps
            reading for as many bytes as a header claims.
        """
        if self._position > self.max_position:
            raise tarfile.ReadError(f"the headers of a member are longer than {MAX_HEADER_BYTES:,} bytes")
        data = self._stream.read(size)
        self._position += len(data)
        self._empty_reads += not data
        if self._empty_reads > MAX_EMPTY_READS:
            raise tarfile.ReadError("it ends within a member")
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """A member whose damaged or missing header is an error; tarfile treats it as the end of an archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it has no end-of-archive marker") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def decompress_if_gzip(stream: BinaryIO, location: str) -> BinaryIO:
    """Return a stream of the unpacked content: the stream itself if it is not compressed.

    Raises
    ------
    InputError
        If it is compressed with another format than gzip.
    """
    start = stream.peek(8)[:8]  # type: ignore[attr-defined]
    compression = next(
        (name for magic, name in UNSUPPORTED_COMPRESSION.items() if start.startswith(magic)), None
    )
    if compression:
        raise InputError(
            f"{location} is compressed with {compression}: unpack it, or compress it with gzip instead"
        )
    return cast("BinaryIO", gzip.GzipFile(fileobj=stream)) if start.startswith(GZIP_MAGIC) else stream


def read_gzip_to_verify_checksum(stream: BinaryIO) -> None:
    """Read a gzip stream to its end, where its checksum is verified."""
    while isinstance(stream, gzip.GzipFile) and stream.read(TAR_BUFFER_BYTES):
        pass


def iter_tar_member_names_and_contents(
    file: DataFile, unused_by_kind: Counter[str]
) -> Iterator[tuple[str, ContentOrSize | None]]:
    """Yield the members of a shard that can be part of a sample.

    Parameters
    ----------
    unused_by_kind : Counter
        Counts the other members, by kind.

    Yields
    ------
    str, ContentOrSize or None
        Name and content of a member, in the order of the archive; one is in memory at a time. The content of
        what is neither image nor label is None.

    Raises
    ------
    InputError
        If the shard is missing or not a complete tar archive, or holds images that are links or sparse
        files, or exceeds a limit.
    """
    with open_stream(file) as raw_stream:
        try:
            unpacked = decompress_if_gzip(raw_stream, file.url)
            stream = PositionLimitedStream(unpacked)
            with tarfile.open(
                fileobj=cast("BinaryIO", stream), mode="r|", tarinfo=_StrictTarInfo, bufsize=TAR_BUFFER_BYTES
            ) as archive:
                count = 0
                while (info := read_next_tar_header(archive, stream)) is not None:
                    count += 1
                    if count > MAX_MEMBERS:
                        raise InputError(
                            f"{file.url} has more than {MAX_MEMBERS:,} members: cut it into several"
                        )
                    if accept_tar_member_or_count_unused(file, info, unused_by_kind):
                        yield info.name, read_content_if_image_or_label(file, archive, info)
            read_gzip_to_verify_checksum(unpacked)
        except InputError:
            raise
        except TAR_READ_ERRORS as error:
            raise InputError(
                f"{file.url} is damaged, truncated or no tar archive: {get_first_error_line(error)}; "
                "write it again"
            ) from error


def read_next_tar_header(archive: tarfile.TarFile, stream: PositionLimitedStream) -> tarfile.TarInfo | None:
    """Return the header of the next member; None at the end.

    Raises
    ------
    tarfile.ReadError
        If headers are longer than ``MAX_HEADER_BYTES``, or invalid.
    """
    # Contents are skipped in chunks, but all headers before a member are in memory at once.
    stream.max_position = archive.offset + MAX_HEADER_BYTES
    info = archive.next()
    # tarfile would keep every member in memory.
    archive.members.clear()  # type: ignore[attr-defined]
    if info is not None:
        stream.max_position = archive.offset + MAX_HEADER_BYTES
        has_name = info.isdir() or PurePosixPath(info.name).name
        if info.size < 0 or not has_name or len(info.name) > MAX_PATH_CHARACTERS:
            raise tarfile.ReadError(
                f"a member of {info.size} bytes has a name of {len(info.name)} characters"
            )
    if sum(len(name) + len(text) for name, text in archive.pax_headers.items()) > MAX_HEADER_BYTES:
        raise tarfile.ReadError(f"the global headers are longer than {MAX_HEADER_BYTES:,} bytes")
    return info


def read_content_if_image_or_label(
    file: DataFile, archive: tarfile.TarFile, info: tarfile.TarInfo
) -> ContentOrSize | None:
    """Return the content of a member that is an image or a label; None for others.

    Raises
    ------
    InputError
        If it is sparse, or a label beyond ``MAX_LABEL_BYTES``; names it.
    """
    extension = get_dotless_lowercase_extension(info.name)
    if extension not in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS):
        return None
    location = f"{sanitize_line(info.name)} in {file.url}"
    if info.issparse():
        raise InputError(f"{location} is a sparse file: write the shard without tar --sparse")
    if extension in LABEL_EXTENSIONS and info.size > MAX_LABEL_BYTES:
        raise InputError(
            f"{location} has {info.size:,} bytes: labels and captions of {MAX_LABEL_BYTES:,} are read"
        )
    if info.size > MAX_IMAGE_BYTES:
        return info.size
    body = archive.extractfile(info)
    return body.read() if body else None


def accept_tar_member_or_count_unused(
    file: DataFile, info: tarfile.TarInfo, unused_by_kind: Counter[str]
) -> bool:
    """Return whether a member can be part of a sample; count those that cannot, by kind.

    Raises
    ------
    InputError
        If it is a link in place of an image or a label: a stream cannot go back to its target.
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
    elif get_dotless_lowercase_extension(info.name) in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS):
        raise InputError(
            f"{info.name} in {file.url} is a link to {info.linkname}: write the shard with the files "
            f"themselves (tar --dereference --hard-dereference)"
        )
    else:
        kind = "links"
    unused_by_kind[kind] += 1
    return False
