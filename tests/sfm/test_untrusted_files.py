"""Files and JSON that anybody wrote: bounded before memory is taken."""

import os
from pathlib import Path

import pytest

from sfm.untrusted_files import OversizeError, parse_json, read_bounded_file


@pytest.mark.parametrize(
    "data", [b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**5, b'"\\ud800"', b"\xff", b"", b"{} {}"]
)
def test_invalid_or_too_deep_json_raises_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(data)


def test_oversized_json_is_refused_by_its_length() -> None:
    with pytest.raises(OversizeError, match="at most 16777216"):
        parse_json(b" " * (16 * 2**20 + 1))


def test_oversized_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    with file.open("wb") as sparse:
        sparse.truncate(10**12)
    with pytest.raises(OversizeError, match=r"run\.json has 1000000000000 bytes"):
        read_bounded_file(file)


def test_named_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_bounded_file(tmp_path / "run.json")


def test_file_of_at_most_max_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"x" * 100)
    assert read_bounded_file(tmp_path / "run.json", max_bytes=100) == b"x" * 100
    with pytest.raises(OversizeError):
        read_bounded_file(tmp_path / "run.json", max_bytes=99)
