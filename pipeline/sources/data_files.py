"""Find and open the files of a dataset, on a disk, on a web server or in a bucket."""

import contextlib
import fnmatch
import io
import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urlsplit

import braceexpand
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import HTTPStore, ObjectStore

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.file_tree import (
    describe_dangling_link,
    refuses_every_dangling_link,
    walk_relative_paths_and_entries,
)
from sfm.pipeline.sources.inventory import HIDDEN_KIND
from sfm.pipeline.sources.sample import VANISHED_MESSAGE
from sfm.pipeline.sources.source import compute_digest
from sfm.stats_store.dataset_names import make_dataset_name, make_dataset_name_from_folder
from sfm.stats_store.location import (
    LONG_RETRY,
    REMOTE_SCHEMES,
    SHORT_RETRY,
    connect_object_store,
    explain_store_error,
)
from sfm.text import get_first_error_line, sanitize_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import BytesStream, GetOptions, ObjectMeta

STREAM_CHUNK_BYTES = 1 << 20
LOOKUP_THREADS = 16
MAX_FILES = 1_000_000
"""Maximum number of files that a pattern expands to."""

MAX_RANGE_DIGITS = 18
"""Maximum number of digits of a number in a pattern."""

MISSING_MESSAGE = "there is no file {}"
CHANGED_MESSAGE = "{} changed while the dataset was read; run again"

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class DataFile:
    """A file of a dataset, with its size and version when the dataset was opened.

    Attributes
    ----------
    url : str
        Path or URL, without credentials.
    size_bytes : int
        In bytes.
    version_tag : str
        Entity tag or modification time, which changes with the file.
    """

    url: str
    size_bytes: int
    version_tag: str


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{000..019}`` and ``{a,b}``, as shells and WebDataset do; leading zeros are kept.

    Raises
    ------
    InputError
        If braces do not match, or expand to no name or to more than ``MAX_FILES`` names.
    """
    # braceexpand would hold all numbers of a range in memory.
    is_too_long = any(
        max(len(start), len(stop)) > MAX_RANGE_DIGITS or abs(int(start) - int(stop)) > MAX_FILES
        for start, stop in _RANGE.findall(pattern)
    )
    try:
        expanded = () if is_too_long else braceexpand.braceexpand(pattern, escape=False)
        names = list(itertools.islice(expanded, MAX_FILES + 1))
    except ValueError as error:
        raise InputError(f"{pattern} has an unmatched brace") from error
    if is_too_long or len(names) > MAX_FILES:
        raise InputError(f"{sanitize_line(pattern, 300)} expands to more than {MAX_FILES:,} files")
    if any("{" in name or "}" in name for name in names):
        raise InputError(f"{pattern} has a brace that is neither a range {{000..019}} nor a list {{a,b}}")
    return names


def is_remote_url(path_or_url: str) -> bool:
    """Return whether a path or URL is on another machine."""
    return "://" in path_or_url and not path_or_url.startswith("file://")


def resolve_local_path(path_or_url: str) -> Path:
    """Return the path of a ``file://`` URL, or of a path that may begin with ``~``."""
    is_url = path_or_url.startswith("file://")
    return expand_home(unquote(urlsplit(path_or_url).path) if is_url else path_or_url)


def find_files_by_pattern(pattern: str) -> list[DataFile]:
    """Return the files that match a pattern, in the order of the pattern.

    Parameters
    ----------
    pattern : str
        Path or URL with braces, and with ``*`` on disks and in buckets, which can be listed.

    Raises
    ------
    InputError
        If a file is missing, or nothing matches.
    """
    names = expand_braces(pattern)
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        files = [file for found in pool.map(_match_wildcard_or_stat_file, names) for file in found]
    urls = [file.url for file in files]
    if len(set(urls)) < len(urls):
        repeated = next(url for url, count in Counter(urls).items() if count > 1)
        raise InputError(f"{pattern} means {repeated} more than once")
    return files


def _match_wildcard_or_stat_file(path_or_url: str) -> list[DataFile]:
    name = path_or_url if is_remote_url(path_or_url) else str(resolve_local_path(path_or_url))
    if "*" in name:
        pattern = name.replace("[", "[[]").replace("?", "[?]")
        folder = posixpath.dirname(name.partition("*")[0])

        def matches(path: str) -> bool:
            return fnmatch.fnmatchcase(posixpath.join(folder, path), pattern)

        found = [
            file
            for file in list_files_below(
                folder, refuses_dangling_link=matches, max_depth=name.count("/", len(folder) + 1)
            )
            if fnmatch.fnmatchcase(file.url, pattern) and file.url.count("/") == name.count("/")
        ]
    else:
        found = [_stat_remote_file(name) if is_remote_url(name) else _stat_local_file(Path(name))]
    if not found:
        raise InputError(f"no file matches {name}")
    return found


def _stat_local_file(path: Path, missing_message_format: str = MISSING_MESSAGE) -> DataFile:
    if missing_message_format == MISSING_MESSAGE and path.is_symlink() and not path.exists():
        raise InputError(describe_dangling_link(path))
    with raise_input_error_on_read_error(str(path), missing_message_format):
        status = path.stat()
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return DataFile(str(path), status.st_size, str(status.st_mtime_ns))


def _stat_remote_file(url: str) -> DataFile:
    store, path = _connect_to_store_and_get_object_path(url, retry_for_long=False)
    with raise_input_error_on_read_error(url):
        return _make_data_file(url, obstore.head(store, path))


def _make_data_file(url: str, meta: "ObjectMeta") -> DataFile:
    return DataFile(url, meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def list_files_below(
    folder_or_url: str,
    unused_by_kind: Counter[str] | None = None,
    refuses_dangling_link: Callable[[str], bool] = refuses_every_dangling_link,
    max_depth: int | None = None,
) -> list[DataFile]:
    """Return all files below a folder, or below a prefix in a bucket, sorted by path; links are followed.

    Parameters
    ----------
    folder_or_url : str
        Path of a folder, or URL of a prefix in a bucket.
    unused_by_kind : Counter, optional
        Counts hidden and special files, by kind.
    refuses_dangling_link : callable
        Given a path below the folder, returns whether a dangling link of that name stops the run.
    max_depth : int, optional
        Maximum depth of folders, on a disk.

    Raises
    ------
    InputError
        If the folder cannot be listed, or a needed link is dangling.
    """
    unused_by_kind = Counter() if unused_by_kind is None else unused_by_kind
    if not is_remote_url(folder_or_url):
        root = resolve_local_path(folder_or_url)
        if not root.is_dir():
            return []
        paths = [
            root / path
            for path, _ in walk_relative_paths_and_entries(
                str(root), unused_by_kind, refuses_dangling_link, max_depth
            )
        ]
        return sorted(map(_stat_local_file, paths), key=lambda file: file.url)
    if urlsplit(folder_or_url).scheme not in REMOTE_SCHEMES:
        raise InputError(
            f"{folder_or_url}: a web server cannot be listed; name the files with braces, {{000..019}}"
        )
    bucket = "/".join(folder_or_url.split("/")[:3])
    store, prefix = _connect_to_store_and_get_object_path(folder_or_url, retry_for_long=False)
    with raise_input_error_on_read_error(folder_or_url):
        objects = [item for batch in obstore.list(store, prefix=prefix or None) for item in batch]
    files = []
    for item in objects:
        file = _make_data_file(f"{bucket}/{item['path']}", item)
        if "/." in file.url.removeprefix(folder_or_url.rstrip("/")):
            unused_by_kind[HIDDEN_KIND] += 1
        else:
            files.append(file)
    return sorted(files, key=lambda file: file.url)


def _connect_to_store_and_get_object_path(url: str, *, retry_for_long: bool) -> tuple[ObjectStore, str]:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InputError(f"the dataset URL ({parts.scheme}://...) carries credentials: leave them out of it")
    path = unquote(parts.path).strip("/")
    if parts.scheme in ("http", "https"):
        return (
            HTTPStore.from_url(
                f"{parts.scheme}://{parts.netloc}",
                client_options={"allow_http": parts.scheme == "http"},
                retry_config=LONG_RETRY if retry_for_long else SHORT_RETRY,
            ),
            path,
        )
    return connect_object_store(f"{parts.scheme}://{parts.netloc}", use_long_retries=retry_for_long), path


@contextlib.contextmanager
def raise_input_error_on_read_error(
    url: str, missing_message_format: str = MISSING_MESSAGE
) -> Iterator[None]:
    """Translate errors of servers and disks into one line that names the file.

    Raises
    ------
    InputError
        If the file cannot be reached or read.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError(missing_message_format.format(url)) from None
    except PreconditionError:
        raise InputError(CHANGED_MESSAGE.format(url)) from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        if url.startswith("http"):
            raise InputError(f"cannot read {url}: the server refuses access (401 or 403)") from None
        raise InputError(explain_store_error(error, url)) from None
    except BaseError as error:
        # Later lines may quote request headers.
        line = get_first_error_line(error) if url.startswith("http") else explain_store_error(error, url)
        raise InputError(f"cannot read {url}: {line}" if url.startswith("http") else line) from None
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or get_first_error_line(error)}") from error


@contextlib.contextmanager
def open_stream(file: DataFile) -> Iterator[BinaryIO]:
    """Open a file for sequential reading; at most one chunk of it is in memory.

    Raises
    ------
    InputError
        If it is missing, has changed, or the connection is lost after retries.
    """
    if not is_remote_url(file.url):
        require_unchanged_file(file, _stat_local_file(Path(file.url), VANISHED_MESSAGE))
        with raise_input_error_on_read_error(file.url, VANISHED_MESSAGE), Path(file.url).open("rb") as local:
            yield local
        return
    store, path = _connect_to_store_and_get_object_path(file.url, retry_for_long=True)
    with raise_input_error_on_read_error(file.url, VANISHED_MESSAGE):
        response = obstore.get(store, path)
    require_unchanged_file(file, _make_data_file(file.url, response.meta))
    body = _ResponseBody(file.url, response.stream(min_chunk_size=STREAM_CHUNK_BYTES))
    yield io.BufferedReader(body, STREAM_CHUNK_BYTES)


def open_seekable(file: DataFile) -> BinaryIO:
    """Open a file for random access; reading raises InputError if the file is replaced meanwhile.

    Raises
    ------
    InputError
        If it is missing or has changed.
    """
    if not is_remote_url(file.url):
        require_unchanged_file(file, _stat_local_file(Path(file.url), VANISHED_MESSAGE))
        with raise_input_error_on_read_error(file.url, VANISHED_MESSAGE):
            return Path(file.url).open("rb")
    store, path = _connect_to_store_and_get_object_path(file.url, retry_for_long=True)
    with raise_input_error_on_read_error(file.url, VANISHED_MESSAGE):
        require_unchanged_file(file, _make_data_file(file.url, obstore.head(store, path)))
    return io.BufferedReader(_RangeReader(file, store, path), STREAM_CHUNK_BYTES)


def require_unchanged_file(listed: DataFile, current: DataFile) -> None:
    """Refuse a file that has changed since the dataset was opened.

    Raises
    ------
    InputError
        With the name of the file.
    """
    if (listed.size_bytes, listed.version_tag) != (current.size_bytes, current.version_tag):
        raise InputError(CHANGED_MESSAGE.format(listed.url))


class _ResponseBody(io.RawIOBase):
    """The body of a response as a file object, which tarfile needs."""

    def __init__(self, url: str, chunks: "BytesStream") -> None:
        self._url = url
        self._chunks = chunks
        self._remaining = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        if not self._remaining:
            with raise_input_error_on_read_error(self._url, VANISHED_MESSAGE):
                self._remaining = memoryview(bytes(next(self._chunks, b"")))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._remaining))
        target[:size], self._remaining = self._remaining[:size], self._remaining[size:]
        return size


class _RangeReader(io.RawIOBase):
    """A remote file with random access, because pyarrow needs a file object.

    `obstore.open_reader` has no ``closed``, which pyarrow needs, and does not notice a replaced object.
    """

    def __init__(self, file: DataFile, store: ObjectStore, path: str) -> None:
        self._file = file
        self._store = store
        self._path = path
        self._position = 0
        # Weak entity tags (W/"…") never match, and dates are no entity tags.
        self._condition: GetOptions = (
            {"if_match": file.version_tag} if file.version_tag.startswith('"') else {}
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size_bytes}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        end = min(self._position + len(target), self._file.size_bytes)
        if end <= self._position:
            return 0
        options: GetOptions = {**self._condition, "range": (self._position, end)}
        with raise_input_error_on_read_error(self._file.url, VANISHED_MESSAGE):
            data = memoryview(bytes(obstore.get(self._store, self._path, options=options).bytes()))
        target[: len(data)] = data
        self._position += len(data)
        return len(data)


def derive_dataset_name_from_folder_part(path_or_pattern: str, file_suffixes: str | tuple[str, ...]) -> str:
    """Derive the name of a dataset from a path or pattern: its folder, its prefix or else its bucket.

    Parameters
    ----------
    path_or_pattern : str
        Path or URL of a folder or a file, or a pattern of files.
    file_suffixes : str or tuple of str
        A path without one of these at its end is that of a folder.
    """
    literal = re.split(r"[{*]", path_or_pattern)[0]
    is_folder = literal == path_or_pattern and not path_or_pattern.endswith(file_suffixes)
    folder = literal if is_folder else posixpath.dirname(literal)
    if not is_remote_url(path_or_pattern):
        return make_dataset_name_from_folder(resolve_local_path(folder or "."))
    return make_dataset_name([part for part in folder.split("/") if part][-1])


def digest_file_states(files: Sequence[DataFile]) -> str:
    """Return a digest (hexadecimal) of the names, sizes and versions of files, for `Split.listing_digest`."""
    return compute_digest("\n".join(f"{file.url} {file.size_bytes} {file.version_tag}" for file in files))
