"""The one format of class lists, and how a class is found by what is written in one."""

import unicodedata

import pytest

from sfm.errors import InputError
from sfm.stats_store.class_lists import find_class_id, parse_class_list, read_class_file

NFC, NFD = unicodedata.normalize("NFC", "été"), unicodedata.normalize("NFD", "été")


def test_hash_starts_a_comment_only_at_the_start_of_a_line():
    found = parse_class_list("# languages\nc\nc#\nf #2\n", "a list")
    assert found.class_ids == ["c", "c#", "f #2"]


def test_a_display_name_follows_a_tab():
    found = parse_class_list("c\tThe C language\n\n go \n", "a list")
    assert (found.class_ids, found.display_names) == (["c", "go"], {"c": "The C language"})


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfc\ngo\n", b"c\r\ngo\r\n", b"c\ngo"])
def test_class_file_with_bom_crlf_or_no_final_newline_is_read(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    assert read_class_file(tmp_path / "list.txt").class_ids == ["c", "go"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"caf\xe9\n", "it is not UTF-8 text"),
        (b"c\ngo\nc\n", "line 3 of class list .* repeats the class c"),
        (f"{NFC}\n{NFD}\n".encode(), "line 2 of class list .* repeats"),
        (b"# none\n", "holds no class"),
    ],
)
def test_invalid_class_file_is_refused(tmp_path, data, complaint):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(InputError, match=complaint):
        read_class_file(tmp_path / "list.txt")


def test_class_is_found_by_either_unicode_normal_form_or_escaped_text():
    ids = ["c", NFD, "cat\nFelis"]
    assert find_class_id("c", ids) == "c"
    assert find_class_id(NFC, ids) == NFD
    assert find_class_id(r"cat\nFelis", ids) == "cat\nFelis"
    assert find_class_id("d", ids) is None
