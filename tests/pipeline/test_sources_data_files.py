"""Patterns of files: braces and stars, on a disk, a web server and in a bucket."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest
from s3_server import open_bucket

from sfm.errors import InputError
from sfm.pipeline.sources.data_files import (
    derive_dataset_name_from_folder_part,
    digest_file_states,
    expand_braces,
    find_files_by_pattern,
    open_seekable,
    open_stream,
)
from sfm.pipeline.sources.split_files import find_split_files, find_split_named_in_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{008..10}", ["008", "009", "010"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{b,a}-{0,1}", ["b-0", "b-1", "a-0", "a-1"]),
        ("{train-{0..1},val}.tar", ["train-0.tar", "train-1.tar", "val.tar"]),
        (r"a\{1,2}", [r"a\1", r"a\2"]),
    ],
)
def test_braces_expand_as_in_shells_and_webdataset(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("a{0..3", "has an unmatched brace"),
        ("a}.tar", "has an unmatched brace"),
        ("a}{b", "neither a range"),
        ("{7}.tar", "neither a range"),
        ("{}", "neither"),
        ("{0..9999999999999}.tar", "more than 1,000,000 files"),
        ("{0..999}{0..999}{0..999}{0..999}", "more than 1,000,000 files"),
        (f"{{0..{'9' * 5000}}}.tar", "more than 1,000,000 files"),
    ],
)
def test_invalid_or_huge_braces_raise_a_one_line_error(pattern, complaint):
    with pytest.raises(InputError, match=complaint) as refused:
        expand_braces(pattern)
    assert "\n" not in str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of two splits, with characters that patterns must take literally, and one that is no shard."""
    root = tmp_path / "my [set]"
    root.mkdir()
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "README.md", ".train-9.tar"):
        (root / name).write_bytes(name.encode())
    return root


def get_file_names(files: list) -> list[str]:
    return [Path(file.url).name for file in files]


def test_files_are_listed_in_the_order_of_the_pattern(folder):
    assert get_file_names(find_files_by_pattern(f"{folder}/train-{{1,0}}.tar")) == [
        "train-1.tar",
        "train-0.tar",
    ]
    assert get_file_names(find_files_by_pattern(f"{folder}/*-0.tar")) == ["train-0.tar", "val-0.tar"]


def test_splits_are_inferred_from_file_names_in_folders_and_patterns(folder):
    for place in (
        str(folder),
        f"{folder}/",
        f"{folder}/*.tar",
        f"{folder}/{{train-0,train-1,val-0}}.tar",
    ):
        found = find_split_files(place, (".tar",))
        assert get_file_names(found.train) == ["train-0.tar", "train-1.tar"]
        assert get_file_names(found.test) == ["val-0.tar"]


def test_a_test_pattern_without_a_slash_is_relative_to_the_training_files(folder):
    for test in ("val-0.tar", f"{folder}/val-{{0..0}}.tar"):
        assert get_file_names(
            find_split_files(f"{folder}/train-*.tar", (".tar",), test_split_name_or_pattern=test).test
        ) == ["val-0.tar"]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/train-00000-of-00010.parquet", "train"),
        ("/imagenet1k-validation-07.tar", "val"),
        ("/data/test/0001.tar", "test"),
        ("/trainval.tar", None),
        ("/contest.tar", None),
    ],
)
def test_a_split_is_a_whole_word_of_a_path(path, word):
    assert find_split_named_in_path(path) == word


@pytest.mark.parametrize(
    ("place", "test", "complaint"),
    [
        ("{root}/train-{{0..2}}.tar", "val-0.tar", "there is no file .*train-2.tar"),
        ("{root}/holiday-*.tar", "val-0.tar", "no file matches .*holiday"),
        ("{root}/train-*.tar", "test-*.tar", "no file matches .*test"),
        ("{root}/nowhere", None, "no file that ends in .tar under .*nowhere"),
        ("{root}/train-{{0,0}}.tar", "val-0.tar", "train-0.tar more than once"),
        ("https://example.org/train-*.tar", None, "a web server cannot be listed"),
        ("http://user:secret@example.org/train-0.tar", "x.tar", "carries credentials"),
        ("ftp://example.org/train-0.tar", "x.tar", "unknown store location ftp"),
    ],
)
def test_missing_or_unreachable_files_are_named_in_the_error(folder, place, test, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        find_split_files(place.format(root=folder), (".tar",), test_split_name_or_pattern=test)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/in1k/train-{0..9}.tar", "in1k"),
        ("/data/in1k/", "in1k"),
        ("/data/v1.0", "v1.0"),
        ("s3://bucket/in1k/train-*.tar", "in1k"),
        ("s3://bucket", "bucket"),
        ("https://example.org/sets/in1k/train.tar", "in1k"),
    ],
)
def test_a_dataset_is_named_after_its_folder(place, name):
    assert derive_dataset_name_from_folder_part(place, ".tar") == name


@pytest.fixture
def web_server(folder: Path) -> Iterator[str]:
    """The URL of a web server that serves the folder; it knows no ranges and no entity tags."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["disk", "web", "bucket"])
def folder_url(request: pytest.FixtureRequest, folder: Path) -> str:
    """The same files on a disk, on a web server, and in a bucket."""
    if request.param == "disk":
        return str(folder)
    if request.param == "web":
        return str(request.getfixturevalue("web_server"))
    url = str(request.getfixturevalue("s3_url"))
    for file in folder.iterdir():
        obstore.put(open_bucket(url), file.name, file.read_bytes())
    return url


def test_a_file_reads_the_same_from_disk_web_server_and_bucket(folder_url):
    files = find_files_by_pattern(f"{folder_url}/{{train-{{0..1}},val-0}}.tar")
    for file in files:
        with open_stream(file) as stream:
            assert stream.read(3) + stream.read() == Path(file.url).name.encode()
    assert digest_file_states(files) == digest_file_states(
        find_files_by_pattern(f"{folder_url}/{{train-{{0..1}},val-0}}.tar")
    )
    assert digest_file_states(files) != digest_file_states(files[1:])


def test_a_missing_file_is_named_in_the_error_on_disk_web_server_and_bucket(folder_url):
    with pytest.raises(
        InputError,
        match=f"there is no file {folder_url.replace('[', '.').replace(']', '.')}/gone.tar",
    ):
        find_files_by_pattern(f"{folder_url}/gone.tar")


def test_files_in_a_bucket_are_found_by_listing(folder, s3_url):
    for file in folder.iterdir():
        obstore.put(open_bucket(s3_url), file.name, file.read_bytes())
    found = find_split_files(s3_url, (".tar",))
    assert get_file_names(found.train) == ["train-0.tar", "train-1.tar"]
    assert get_file_names(found.test) == ["val-0.tar"]
    assert get_file_names(find_files_by_pattern(f"{s3_url}/train-*.tar")) == ["train-0.tar", "train-1.tar"]
    file = open_seekable(found.test[0])
    file.seek(4)
    assert bytes(file.read(1)) == b"0"


@pytest.mark.parametrize("opened", [lambda file: open_stream(file).__enter__(), open_seekable])
def test_a_file_that_vanishes_or_changes_is_named_in_the_error(folder, s3_url, opened):
    for file in folder.iterdir():
        obstore.put(open_bucket(s3_url), file.name, file.read_bytes())
    local, remote = (
        find_files_by_pattern(f"{folder}/train-{{0,1}}.tar"),
        find_files_by_pattern(f"{s3_url}/train-{{0,1}}.tar"),
    )
    (folder / "train-0.tar").unlink()
    (folder / "train-1.tar").write_bytes(b"another")
    obstore.delete(open_bucket(s3_url), "train-0.tar")
    obstore.put(open_bucket(s3_url), "train-1.tar", b"train-2.tar")
    for gone, other in (local, remote):
        with pytest.raises(InputError, match=r"train-0.tar vanished while the dataset was read"):
            opened(gone)
        with pytest.raises(InputError, match=r"train-1.tar changed while the dataset was read"):
            opened(other)


def test_a_file_replaced_while_being_read_is_named_in_the_error(s3_url):
    def put(content: bytes) -> None:
        obstore.put(open_bucket(s3_url), "train-0.tar", content)

    put(bytes(4 << 20))
    (file,) = find_files_by_pattern(f"{s3_url}/train-0.tar")
    with open_seekable(file) as stream:
        assert stream.read(4) == bytes(4)
        put(b"1" * (4 << 20))
        stream.seek(3 << 20)
        with pytest.raises(InputError, match=r"train-0.tar changed while the dataset was read; run again"):
            stream.read(4)


def test_an_unreachable_server_is_named_in_the_error():
    with pytest.raises(InputError, match=r"cannot read http://127.0.0.1:1/a\.tar"):
        find_files_by_pattern("http://127.0.0.1:1/a.tar")
