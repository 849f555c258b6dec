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
from sfm.pipeline.sources.inventory import HIDDEN, IMAGES, NO_FILE, extension_of, kind_of
from sfm.pipeline.sources.places import DataFile, open_stream
from sfm.pipeline.sources.source import some

LABELS = ("cls", "json", "txt")
GZIP = b"\x1f\x8b"
OTHER_COMPRESSION = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
CHUNK = 1 << 20
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)
AHEAD = 16
"""Samples with dotted names that are held back, in case that they turn out to be parts of one sample."""


class NoLabelError(InputError):
    """A sample has an image, but no label."""


@dataclass
class Group:
    """Neighbouring members that share the name up to the first dot.

    Attributes
    ----------
    key : str
        That name.
    parts : dict of str to bytes
        Images and labels, by what follows the first dot.
    dotted : dict of str to dict
        Images and labels with more dots: by their name up to the last dot, then by what follows.
    others : list of str
        Names of members that are neither.
    """

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    dotted: dict[str, dict[str, bytes]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def names(self) -> str:
        """Return what the members' names end in, as text."""
        ends = [f".{end}" for end in self.parts]
        ends += [
            f"{stem.removeprefix(self.key)}.{end}" for stem, parts in self.dotted.items() for end in parts
        ]
        ends += [name.removeprefix(self.key) for name in self.others]
        return some(ends) if len(ends) != 1 else f"only {ends[0]}"


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


def decompress_stream(stream: BinaryIO, where: str) -> BinaryIO:
    """Return a stream of what a stream holds once it is unpacked: itself, if gzip has not compressed it.

    Raises
    ------
    InputError
        If it is compressed otherwise.
    """
    start = stream.peek(8)[:8]  # type: ignore[attr-defined]
    other = next((name for magic, name in OTHER_COMPRESSION.items() if start.startswith(magic)), None)
    if other:
        raise InputError(f"{where} is compressed with {other}: unpack it, or compress it with gzip instead")
    return cast("BinaryIO", gzip.GzipFile(fileobj=stream)) if start.startswith(GZIP) else stream


def drain(stream: BinaryIO) -> None:
    """Read what gzip has behind the archive: its checksum is there."""
    while isinstance(stream, gzip.GzipFile) and stream.read(CHUNK):
        pass


def members(file: DataFile, unused: Counter[str]) -> Iterator[tuple[str, bytes | None]]:
    """Stream the members of a shard.

    Parameters
    ----------
    unused : Counter
        Gets the members that no sample can hold, by kind.

    Yields
    ------
    str, bytes or None
        Name and content of a member, in the order of the archive; only one is in memory. None for the
        content of what is neither image nor label.

    Raises
    ------
    InputError
        If the shard is not there, is not a whole tar archive, or holds links in place of images.
    """
    with open_stream(file) as stream:
        try:
            content = decompress_stream(stream, file.url)
            with tarfile.open(fileobj=content, mode="r|", tarinfo=_Header, bufsize=CHUNK) as archive:
                while (info := archive.next()) is not None:
                    # tarfile would remember every member, to find it again.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if can_hold_sample(file, info, unused):
                        part = extension_of(info.name) in (*IMAGES, *LABELS)
                        body = archive.extractfile(info) if part else None
                        yield info.name, body.read() if body else None
            drain(content)
        except DAMAGE as error:
            raise InputError(
                f"{file.url} is damaged, truncated or no tar archive: {error}; write it again"
            ) from error


def can_hold_sample(file: DataFile, info: tarfile.TarInfo, unused: Counter[str]) -> bool:
    """Say whether a member may be part of a sample; count those that cannot be, by kind.

    Raises
    ------
    InputError
        If it is a link in place of an image or a label: a stream cannot go back to what it stands for.
    """
    if info.isdir():
        return False
    if PurePosixPath(info.name).name.startswith("."):
        kind = HIDDEN
    elif info.name.startswith("__"):
        kind = "about the shard (__*)"
    elif info.isreg():
        return True
    elif not (info.islnk() or info.issym()):
        kind = NO_FILE
    elif extension_of(info.name) in (*IMAGES, *LABELS):
        raise InputError(
            f"{info.name} in {file.url} is a link to {info.linkname}: write the shard with the files "
            f"themselves (tar --dereference --hard-dereference)"
        )
    else:
        kind = "links"
    unused[kind] += 1
    return False


def key_of(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and what follows the first dot, in small letters."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)), extension.lower()


def sample_parts(file: DataFile, unused: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Stream the samples of a shard: each a key, and its images and labels by extension.

    Neighbouring members that share the name up to the first dot are one sample, as WebDataset has it; members
    with more dots are further parts of it. Where there is nothing but such, as in ``0_img.003.png`` beside
    ``0_img.003.cls``, names are cut at the last dot.

    Raises
    ------
    InputError
        If the shard is damaged, or an image or a label cannot be paired; names it.
    """
    group: Group | None = None
    streamed = False
    for name, content in members(file, unused):
        key, extension = key_of(name)
        if group is None or key != group.key:
            yield from () if group is None else samples_in(group, file, unused, streamed)
            group, streamed = Group(key), False
        if content is None:
            group.others.append(name)
            continue
        stem, end = (
            (key, extension) if "." not in extension else (name[: name.rindex(".")], extension_of(name))
        )
        if stem != key and stem not in group.dotted and len(group.dotted) == AHEAD:
            yield from dotted_samples(group, file)
            group.dotted.clear()
            streamed = True
        parts = group.parts if stem == key else group.dotted.setdefault(stem, {})
        if end in parts:
            raise InputError(f"{file.url} holds {name} twice")
        parts[end] = content
    if group is not None:
        yield from samples_in(group, file, unused, streamed)


def samples_in(
    group: Group, file: DataFile, unused: Counter[str], streamed: bool
) -> Iterator[tuple[str, dict[str, bytes]]]:
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
    unused.update(kind_of(name) for name in group.others)
    if not group.parts:
        # Captions and metadata that go with no image are no samples.
        for stem in [stem for stem, parts in group.dotted.items() if not {"cls", *IMAGES} & parts.keys()]:
            unused.update(f".{end}" for end in group.dotted.pop(stem))
        yield from dotted_samples(group, file)
        return
    if streamed:
        raise InputError(
            f"{group.key} in {file.url} has an image or label of its own beside many with more dots in their "
            f"names: cannot tell which belong together; rename them without dots"
        )
    images = [end for end in group.parts if end in IMAGES]
    if len(images) != 1:
        found = " and ".join(f".{image}" for image in images) or group.names()
        hint = "" if images else f": name the image {PurePosixPath(group.key).name}.EXTENSION"
        raise InputError(f"{group.key} in {file.url} must have one image, found {found}{hint}")
    for stem, parts in group.dotted.items():
        unused.update(f"{stem.removeprefix(group.key)}.{end}".lower() for end in parts)
    yield group.key, group.parts


def dotted_samples(group: Group, file: DataFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of members whose names are cut at the last dot.

    Raises
    ------
    InputError
        If one lacks an image or a label (:class:`NoLabelError`); names it.
    """
    for stem, parts in group.dotted.items():
        images = [end for end in parts if end in IMAGES]
        if len(images) != 1 or len(parts) == len(images):
            kind = NoLabelError if len(images) == 1 else InputError
            raise kind(
                f"{stem}.{next(iter(parts))} in {file.url} cannot be paired: beside an image there must be a "
                f"label of the same name (.{', .'.join(LABELS)}); found {group.names()}"
            )
        yield stem, parts
