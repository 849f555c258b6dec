"""Group the members of a tar shard into samples, as WebDataset does."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import DataFile
from sfm.pipeline.sources.inventory import (
    IMAGE_EXTENSIONS,
    get_dotless_lowercase_extension,
    get_unused_kind_from_extension,
)
from sfm.pipeline.sources.limits import MAX_BATCH_BYTES, MAX_MEMBER_GROUP_BYTES
from sfm.pipeline.sources.tar_members import (
    LABEL_EXTENSIONS,
    ContentOrSize,
    iter_tar_member_names_and_contents,
)
from sfm.text import format_names

MAX_HELD_SAMPLES = 16
"""Maximum number of buffered samples with dotted names, which may be parts of one sample."""


class MissingLabelError(InputError):
    """A sample has an image, but no label."""


class TarSample(NamedTuple):
    """A sample of a shard.

    Attributes
    ----------
    key : str
        The shared name of its members.
    content_by_extension : dict of str to ContentOrSize
        Its images and labels.
    """

    key: str
    content_by_extension: dict[str, ContentOrSize]


@dataclass
class TarMemberGroup:
    """Neighbouring members that share the name up to the first dot.

    Attributes
    ----------
    key : str
        The shared name.
    content_by_extension : dict of str to ContentOrSize
        Images and labels whose names have one dot, by extension.
    contents_by_dotted_name : dict of str to dict
        Images and labels whose names have more dots: by the name up to the last dot, then by extension.
    unused_names : list of str
        Names of members that are neither image nor label.
    total_content_bytes : int
        Bytes of images and labels.
    """

    key: str
    content_by_extension: dict[str, ContentOrSize] = field(default_factory=dict)
    contents_by_dotted_name: dict[str, dict[str, ContentOrSize]] = field(default_factory=dict)
    unused_names: list[str] = field(default_factory=list)
    total_content_bytes: int = 0

    def add_content(self, stem: str, extension: str, content: ContentOrSize, location: str) -> None:
        """Add an image or a label.

        Raises
        ------
        InputError
            If there is one of that name, or the group becomes too large.
        """
        content_by_extension = (
            self.content_by_extension
            if stem == self.key
            else self.contents_by_dotted_name.setdefault(stem, {})
        )
        if extension in content_by_extension:
            raise InputError(f"{location} twice")
        self.total_content_bytes += len(content) if isinstance(content, bytes) else 0
        if self.total_content_bytes > MAX_MEMBER_GROUP_BYTES:
            raise InputError(
                f"{location} and others of its name, of more than {MAX_MEMBER_GROUP_BYTES:,} bytes together"
            )
        content_by_extension[extension] = content

    def describe_endings(self) -> str:
        """Describe the extensions of the members, for messages."""
        endings = [f".{extension}" for extension in self.content_by_extension]
        endings += [
            f"{stem.removeprefix(self.key)}.{extension}"
            for stem, content_by_extension in self.contents_by_dotted_name.items()
            for extension in content_by_extension
        ]
        endings += [name.removeprefix(self.key) for name in self.unused_names]
        return format_names(endings) if len(endings) != 1 else f"only {endings[0]}"


def split_member_name_at_first_dot(name: str) -> tuple[str, str]:
    """Return the key of a member's sample, and what follows the first dot of its name, in lower case."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)), extension.lower()


def iter_tar_samples(file: DataFile, unused_by_kind: Counter[str]) -> Iterator[TarSample]:
    """Yield the samples of a shard.

    Neighbouring members that share the name up to the first dot are one sample, as WebDataset has it; members
    with more dots are further parts of it. Where all names have more dots, as in ``0_img.003.png`` beside
    ``0_img.003.cls``, they are cut at the last dot.

    Parameters
    ----------
    unused_by_kind : Counter
        Counts the members that are part of no sample, by kind.

    Raises
    ------
    InputError
        If the shard is damaged, or an image or a label cannot be paired; names it.
    """
    group: TarMemberGroup | None = None
    is_partial = False
    for name, content in iter_tar_member_names_and_contents(file, unused_by_kind):
        key, extension = split_member_name_at_first_dot(name)
        if group is None or key != group.key:
            yield from () if group is None else iter_group_samples(group, file, unused_by_kind, is_partial)
            group, is_partial = TarMemberGroup(key), False
        if content is None:
            group.unused_names.append(name)
            continue
        stem = key
        if "." in extension:
            stem, extension = name[: name.rindex(".")], get_dotless_lowercase_extension(name)
        holds_enough = (
            len(group.contents_by_dotted_name) == MAX_HELD_SAMPLES
            or group.total_content_bytes > MAX_BATCH_BYTES
        )
        if (
            stem != key
            and stem not in group.contents_by_dotted_name
            and group.contents_by_dotted_name
            and holds_enough
        ):
            yield from iter_samples_with_dotted_names(group, file)
            group.contents_by_dotted_name.clear()
            group.total_content_bytes = 0
            is_partial = True
        group.add_content(stem, extension, content, f"{file.url} holds {name}")
    if group is not None:
        yield from iter_group_samples(group, file, unused_by_kind, is_partial)


def iter_group_samples(
    group: TarMemberGroup, file: DataFile, unused_by_kind: Counter[str], has_yielded_dotted_samples: bool
) -> Iterator[TarSample]:
    """Yield the samples of a group of members: one, or as many as there are dotted names.

    Parameters
    ----------
    has_yielded_dotted_samples : bool
        Whether samples with dotted names of this group were already yielded.

    Raises
    ------
    InputError
        If there is a label but no image, or an image but no label; names it.
    """
    unused_by_kind.update(map(get_unused_kind_from_extension, group.unused_names))
    if not group.content_by_extension:
        # Captions and metadata without an image are no samples.
        sample_extensions = {"cls", *IMAGE_EXTENSIONS}
        for stem, content_by_extension in list(group.contents_by_dotted_name.items()):
            if not sample_extensions & content_by_extension.keys():
                unused_by_kind.update(
                    f".{extension}" for extension in group.contents_by_dotted_name.pop(stem)
                )
        yield from iter_samples_with_dotted_names(group, file)
        return
    if has_yielded_dotted_samples:
        raise InputError(
            f"{group.key} in {file.url} has an image or label besides many with more dots in their "
            f"names: cannot tell which belong together; rename them without dots"
        )
    images = [extension for extension in group.content_by_extension if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        found = " and ".join(f".{image}" for image in images) or group.describe_endings()
        hint = "" if images else f": name the image {PurePosixPath(group.key).name}.EXTENSION"
        raise InputError(f"{group.key} in {file.url} must have one image, found {found}{hint}")
    for stem, content_by_extension in group.contents_by_dotted_name.items():
        unused_by_kind.update(
            f"{stem.removeprefix(group.key)}.{extension}".lower() for extension in content_by_extension
        )
    yield TarSample(group.key, group.content_by_extension)


def iter_samples_with_dotted_names(group: TarMemberGroup, file: DataFile) -> Iterator[TarSample]:
    """Yield the samples of a group's dotted names, which are cut at the last dot.

    Raises
    ------
    InputError
        If one lacks an image or a label (:class:`MissingLabelError`); names it.
    """
    for stem, content_by_extension in group.contents_by_dotted_name.items():
        images = [extension for extension in content_by_extension if extension in IMAGE_EXTENSIONS]
        if len(images) != 1 or len(content_by_extension) == len(images):
            error_type = MissingLabelError if len(images) == 1 else InputError
            raise error_type(
                f"{stem}.{next(iter(content_by_extension))} in {file.url} cannot be paired: beside "
                f"an image there must be a label of the same name (.{', .'.join(LABEL_EXTENSIONS)}); "
                f"found {group.describe_endings()}"
            )
        yield TarSample(stem, content_by_extension)
