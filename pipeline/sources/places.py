"""Where the files of a dataset are: a pattern becomes files on a disk, on a web server or in a bucket."""

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

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, ObjectStore

from sfm.errors import InputError
from sfm.paths import expand_home
from sfm.pipeline.sources.inventory import HIDDEN
from sfm.pipeline.sources.source import VANISHED, digest_of
from sfm.pipeline.sources.walk import always, dangling_link, walk_files
from sfm.stats_store.location import BRIEF_RETRY, PATIENT_RETRY, REMOTE_SCHEMES, connect_object_store, explain_error
from sfm.stats_store.dataset_names import make_name_from_folder, make_dataset_name
from sfm.text import first_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import BytesStream, ObjectMeta

CHUNK = 1 << 20
LOOKUPS = 16
MISSING = "there is no file {}"

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class DataFile:
    """A file of a dataset, as it was when the dataset was opened.

    Attributes
    ----------
    url : str
        Path or URL; holds no credentials.
    size : int
        In bytes.
    version : str
        Changes when the file does: time of change or entity tag.
    """

    url: str
    size: int
    version: str


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{000..019}`` and ``{a,b}``, as shells and WebDataset do; leading zeros are kept.

    Raises
    ------
    InputError
        If a brace is not closed, or stands for nothing.
    """
    opening = pattern.find("{")
    if opening < 0:
        if "}" in pattern:
            raise InputError(f"{pattern} closes a brace that it does not open")
        return [pattern]
    depth, commas = 0, [opening]
    for place in range(opening, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if pattern[place] == "," and depth == 1:
            commas.append(place)
        if depth == 0:
            break
    else:
        raise InputError(f"{pattern} opens a brace that it does not close")
    body, rest = pattern[opening + 1 : place], expand_braces(pattern[place + 1 :])
    found = _RANGE.fullmatch(body)
    if found:
        first, last = found.groups()
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        inner = [str(i).zfill(width) for i in range(int(first), int(last) + step, step)]
    elif len(commas) > 1:
        edges = [*commas, place]
        inner = [
            text
            for start, end in itertools.pairwise(edges)
            for text in expand_braces(pattern[start + 1 : end])
        ]
    else:
        raise InputError(f"{{{body}}} in {pattern} is neither a range {{000..019}} nor a list {{a,b}}")
    return [pattern[:opening] + text + tail for text in inner for tail in rest]


def is_remote(place: str) -> bool:
    """Say whether a path or URL is on another machine."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """Return the path that a place on this machine's disks means."""
    return expand_home(unquote(urlsplit(place).path) if place.startswith("file://") else place)


def find_files(pattern: str) -> list[DataFile]:
    """Find the files a pattern means, in the order of the pattern.

    Parameters
    ----------
    pattern : str
        Path or URL with braces, and with ``*`` where it can be listed: on disks and in buckets.

    Raises
    ------
    InputError
        If a file is missing, or nothing matches.
    """
    names = expand_braces(pattern)
    with ThreadPoolExecutor(LOOKUPS) as pool:
        files = [file for found in pool.map(_matches, names) for file in found]
    urls = [file.url for file in files]
    twice = next((url for url in urls if urls.count(url) > 1), None) if len(set(urls)) < len(urls) else None
    if twice:
        raise InputError(f"{pattern} means {twice} more than once")
    return files


def _matches(name: str) -> list[DataFile]:
    if not is_remote(name):
        name = str(local_path(name))
    if "*" in name:
        pattern = name.replace("[", "[[]").replace("?", "[?]")
        folder = posixpath.dirname(name.partition("*")[0])

        def matters(path: str) -> bool:
            return fnmatch.fnmatchcase(posixpath.join(folder, path), pattern)

        found = [
            file
            for file in list_files(folder, wanted=matters, depth=name.count("/", len(folder) + 1))
            if fnmatch.fnmatchcase(file.url, pattern) and file.url.count("/") == name.count("/")
        ]
    else:
        found = [_remote(name) if is_remote(name) else _local(Path(name))]
    if not found:
        raise InputError(f"no file matches {name}")
    return found


def _local(path: Path, missing: str = MISSING) -> DataFile:
    if missing == MISSING and path.is_symlink() and not path.exists():
        raise InputError(dangling_link(path))
    with reaching(str(path), missing=missing):
        status = path.stat()
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return DataFile(str(path), status.st_size, str(status.st_mtime_ns))


def _remote(url: str) -> DataFile:
    objects, path = _connect(url, patient=False)
    with reaching(url):
        return _described(url, obstore.head(objects, path))


def _described(url: str, meta: "ObjectMeta") -> DataFile:
    return DataFile(url, meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def list_files(
    folder: str,
    unused: Counter[str] | None = None,
    wanted: Callable[[str], bool] = always,
    depth: int | None = None,
) -> list[DataFile]:
    """List all files below a folder or a prefix in a bucket, sorted by path; links are followed.

    Parameters
    ----------
    unused : Counter, optional
        Gets what is passed over, by kind.
    wanted : callable
        Given a path below the folder, says whether a link of that name that leads nowhere matters.
    depth : int, optional
        Folders below one another that are entered at most, on a disk.

    Raises
    ------
    InputError
        If the place cannot be listed, or a link that matters leads nowhere.
    """
    unused = Counter() if unused is None else unused
    if not is_remote(folder):
        root = local_path(folder)
        if not root.is_dir():
            return []
        paths = [root / path for path, _ in walk_files(str(root), unused, wanted, depth)]
        return sorted(map(_local, paths), key=lambda file: file.url)
    if urlsplit(folder).scheme not in REMOTE_SCHEMES:
        raise InputError(f"{folder}: a web server cannot be listed; name the files with braces, {{000..019}}")
    bucket = "/".join(folder.split("/")[:3])
    objects, prefix = _connect(folder, patient=False)
    with reaching(folder):
        listed = [item for batch in obstore.list(objects, prefix=prefix or None) for item in batch]
    files = (_described(f"{bucket}/{item['path']}", item) for item in listed)
    shown = []
    for file in files:
        if "/." in file.url.removeprefix(folder.rstrip("/")):
            unused[HIDDEN] += 1
        else:
            shown.append(file)
    return sorted(shown, key=lambda file: file.url)


def _connect(url: str, *, patient: bool) -> tuple[ObjectStore, str]:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InputError(f"the dataset URL ({parts.scheme}://...) carries credentials: leave them out of it")
    path = unquote(parts.path).strip("/")
    if parts.scheme in ("http", "https"):
        return (
            HTTPStore.from_url(
                f"{parts.scheme}://{parts.netloc}",
                client_options={"allow_http": parts.scheme == "http"},
                retry_config=PATIENT_RETRY if patient else BRIEF_RETRY,
            ),
            path,
        )
    return connect_object_store(f"{parts.scheme}://{parts.netloc}", patient=patient), path


@contextlib.contextmanager
def reaching(url: str, missing: str = MISSING) -> Iterator[None]:
    """Turn what a server or disk reports into one line that names the file.

    Raises
    ------
    InputError
        If the file cannot be reached or read.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError(missing.format(url)) from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        if url.startswith("http"):
            raise InputError(f"cannot read {url}: the server refuses access (401 or 403)") from None
        raise InputError(explain_error(error, url)) from None
    except BaseError as error:
        # What follows the first line may quote request headers.
        line = first_line(error) if url.startswith("http") else explain_error(error, url)
        raise InputError(f"cannot read {url}: {line}" if url.startswith("http") else line) from None
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or first_line(error)}") from error


@contextlib.contextmanager
def open_stream(file: DataFile) -> Iterator[BinaryIO]:
    """Open a file to be read once from its beginning; at most a chunk of it is in memory.

    Raises
    ------
    InputError
        If it is not there any more, is not what it was, or the connection is lost for good.
    """
    if not is_remote(file.url):
        require_same(file, _local(Path(file.url), VANISHED))
        with reaching(file.url, VANISHED), Path(file.url).open("rb") as local:
            yield local
        return
    objects, path = _connect(file.url, patient=True)
    with reaching(file.url, VANISHED):
        answer = obstore.get(objects, path)
    require_same(file, _described(file.url, answer.meta))
    yield io.BufferedReader(_Body(file.url, answer.stream(min_chunk_size=CHUNK)), CHUNK)


def open_seekable(file: DataFile) -> BinaryIO:
    """Open a file to be read in any order.

    Raises
    ------
    InputError
        If it is not there any more, or is not what it was.
    """
    if not is_remote(file.url):
        require_same(file, _local(Path(file.url), VANISHED))
        with reaching(file.url, VANISHED):
            return Path(file.url).open("rb")
    objects, path = _connect(file.url, patient=True)
    with reaching(file.url, VANISHED):
        require_same(file, _described(file.url, obstore.head(objects, path)))
    return io.BufferedReader(_Ranges(file, objects, path), CHUNK)


def require_same(before: DataFile, now: DataFile) -> None:
    """Refuse a file that is not what it was when the dataset was opened.

    Raises
    ------
    InputError
        Names it.
    """
    if (before.size, before.version) != (now.size, now.version):
        raise InputError(f"{before.url} changed while the dataset was read; run again")


class _Body(io.RawIOBase):
    """The body of an answer as a file, since tarfile reads files."""

    def __init__(self, url: str, chunks: "BytesStream") -> None:
        self._url = url
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: "WriteableBuffer") -> int:
        if not self._left:
            with reaching(self._url, VANISHED):
                self._left = memoryview(bytes(next(self._chunks, b"")))
        target = memoryview(into).cast("B")
        size = min(len(target), len(self._left))
        target[:size], self._left = self._left[:size], self._left[size:]
        return size


class _Ranges(io.RawIOBase):
    """A remote file of which any range can be asked for, since pyarrow reads files."""

    def __init__(self, file: DataFile, objects: ObjectStore, path: str) -> None:
        self._file = file
        self._objects = objects
        self._path = path
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, into: "WriteableBuffer") -> int:
        target = memoryview(into).cast("B")
        size = min(len(target), self._file.size - self._place)
        if size <= 0:
            return 0
        with reaching(self._file.url, VANISHED):
            data = obstore.get_range(self._objects, self._path, start=self._place, length=size)
        target[:size] = memoryview(bytes(data))
        self._place += size
        return size


def dataset_name(place: str, suffix: str | tuple[str, ...]) -> str:
    """Return a name for the dataset at a place: of the folder, prefix or else the bucket."""
    fixed = re.split(r"[{*]", place)[0]
    folder = fixed if fixed == place and not place.endswith(suffix) else posixpath.dirname(fixed)
    if not is_remote(place):
        return make_name_from_folder(local_path(folder or "."))
    return make_dataset_name([part for part in folder.split("/") if part][-1])


def listing_of(files: Sequence[DataFile]) -> str:
    """Return the digest (hexadecimal) of what can be seen of files without reading them."""
    return digest_of("\n".join(f"{file.url} {file.size} {file.version}" for file in files))
