"""Inventory of a dataset: image files, unused files by kind, and automatic choices."""

import posixpath
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

IMAGE_EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "avifs", "gif"),
        *("bmp", "tif", "tiff", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm"),
        *("pnm", "pfm"),
    )
)
"""Extensions of images that are decoded."""

UNSUPPORTED_IMAGE_EXTENSIONS = frozenset(
    (
        *("heic", "heif", "jxl", "svg", "psd", "ico", "tga", "dcm", "exr", "hdr", "pcx", "dng"),
        *("cr2", "nef", "arw"),
    )
)
"""Extensions of unsupported images: such a file raises an error and is not skipped silently."""

NON_IMAGE_EXTENSIONS = frozenset(
    (
        *("txt", "json", "jsonl", "csv", "tsv", "xml", "yaml", "yml", "md", "rst", "html", "pdf"),
        *("log", "npy", "npz", "mat", "pt", "pkl", "h5", "db", "ini", "md5", "sha1", "sha256"),
        *("py", "sh", "zip", "tar", "gz"),
    )
)
"""Extensions of files that are no images; they are not opened."""

INDEX_EXTENSIONS = frozenset(("parquet", "arrow", "idx", "index", "bin"))
"""Extensions of data and index files next to images and shards."""

MAGIC_BYTES = 16
HIDDEN_KIND = "hidden"
SPECIAL_FILE_KIND = "neither file nor folder"


@dataclass(frozen=True)
class Inventory:
    """Unused files and automatic choices of a dataset.

    Attributes
    ----------
    unused_by_kind : mapping of str to int
        Number of files that are not used, by kind.
    notes : tuple of str
        Automatic choices, one line each.
    no_held_out_reason : str
        Reason for a missing held-out split, with advice; else empty.
    """

    unused_by_kind: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    no_held_out_reason: str = ""

    def with_more_unused(self, kind: str, count: int) -> "Inventory":
        """Return a copy with `count` more unused files of a kind."""
        unused = Counter(self.unused_by_kind) + Counter({kind: count})
        return Inventory(dict(unused), self.notes, self.no_held_out_reason)


def get_dotless_lowercase_extension(name: str) -> str:
    """Return the extension of a file name without the dot, in lower case; "" if there is none."""
    return posixpath.splitext(name)[1].lower().removeprefix(".")


def could_be_folder_name(name: str) -> bool:
    """Return whether a name may be a folder's: ``cls.v1`` may, ``a.txt`` may not."""
    return (
        get_dotless_lowercase_extension(name)
        not in IMAGE_EXTENSIONS | UNSUPPORTED_IMAGE_EXTENSIONS | NON_IMAGE_EXTENSIONS | INDEX_EXTENSIONS
    )


def get_unused_kind_from_extension(name: str) -> str:
    """Return the kind under which an unused file is counted: its extension with the dot."""
    extension = get_dotless_lowercase_extension(name)
    return f".{extension}" if extension else "without extension"


def format_counts_by_kind(counts: Mapping[str, int]) -> str:
    """Return counts by kind as text, the most frequent first: ``3 .txt, 1 .csv``."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in ordered)


def is_image_file(path: str) -> bool:
    """Return whether a file is to be read as an image: by its extension, or else by its first bytes.

    Raises
    ------
    OSError
        If it has to be opened, and cannot be read.
    """
    extension = get_dotless_lowercase_extension(path)
    if extension in IMAGE_EXTENSIONS or extension in UNSUPPORTED_IMAGE_EXTENSIONS:
        return True
    if extension in NON_IMAGE_EXTENSIONS:
        return False
    from sfm.pipeline.sources.decode import configure_pillow_and_list_formats

    with Path(path).open("rb") as file:
        start = file.read(MAGIC_BYTES)
    accepts = (Image.OPEN[name][1] for name in configure_pillow_and_list_formats())
    return any(accept is not None and bool(accept(start)) for accept in accepts)
