"""Text from data on a terminal: one line, printable, in any encoding."""

import pytest

from sfm.text import escape_non_utf8, escape_non_utf8_in_json, make_encodable, sanitize_line

HOSTILE = {
    "\x1b]52;c;Y3VybA==\x07\x1b[2J": r"\x1b]52;c;Y3VybA==\x07\x1b[2J",
    "birds\r\x1b[2Kall verified": r"birds\r\x1b[2Kall verified",
    "birds\nerror: disk broken": r"birds\nerror: disk broken",
    "safe\u202etxt.exe": r"safe\u202etxt.exe",
    "\x9b31mred": r"\x9b31mred",
    "a\x00b\ttab": r"a\x00b\ttab",
    "line\u2028paragraph\u2029": r"line\u2028paragraph\u2029",
    "caf\udce9": r"caf\xe9",
    "bird\ud800": r"bird\ud800",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_control_and_bidirectional_characters_are_escaped(text, shown):
    assert sanitize_line(text) == shown
    assert sanitize_line(text).isprintable()


@pytest.mark.parametrize(
    "text", ["T-shirt/top", "猫", "می\u200cخواهم", "👩\u200d🚒", "pets [raw]", r"C:\new", "é"]
)
def test_printable_unicode_text_is_unchanged(text):
    assert sanitize_line(text) == text


def test_long_text_is_truncated():
    assert sanitize_line("x" * 10_000_000 + "\n", max_length=50) == "x" * 49 + "…"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"caf\xe9 87.5 +/- 0.1 - ... \u732b"), ("cp1252", r"café 87.5 ± 0.1 – … \u732b")],
)
def test_characters_missing_from_the_encoding_are_replaced(encoding, shown):
    assert make_encodable("café 87.5 ± 0.1 – … 猫", encoding) == shown


def test_only_non_utf8_bytes_are_escaped():
    assert escape_non_utf8("caf\udce9\n猫") == "caf\\xe9\n猫"


def test_non_utf8_paths_in_a_json_document_are_escaped():
    document = {"out": "caf\udce9", "runs": ["a\udce9", 1, None], "caf\udce9": {"x": 1.5}}
    assert escape_non_utf8_in_json(document) == {
        "out": r"caf\xe9",
        "runs": [r"a\xe9", 1, None],
        r"caf\xe9": {"x": 1.5},
    }
