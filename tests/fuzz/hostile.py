"""Values that a hostile writer puts where something else belongs."""

import json
from typing import Any

import hypothesis.strategies as st

MAKE = "$make"
"""Marks a value that is described rather than written out: long, deep, or no JSON at all."""

LONG, DEEP = 100_000, 20_000

TEXTS = (
    "",
    "../x",
    "../../canary/mine",
    "/etc/passwd",
    ".",
    "..",
    "a/b",
    "a\\b",
    "birds",
    "birds@tuning",
    "fish",
    "01" * 16,
    "02" * 16 + "/",
    "02" * 16 + "/train",
    "ab" * 32,
    "AB" * 32,
    "٣" * 8,
    "x\ny",
    "\x1b]0;owned\x07\x1b[2J",
    "\x9b31m",
    "\u202etxt.exe",
    "\u2066a\u2069",
    "a\u2028b",
    "\x00",
    "\ud800",
    "[red]x[/red]",
    "[/]",
    "[link=http://x]y[/link]",
    "[raw](http://x) <script>alert(1)</script> | `x`",
    "{{ 7 * 7 }}",
    "%s %(name)s {0}",
    "nan",
    "-1",
    "file:///etc/passwd",
    "s3://bucket/x",
    "http://127.0.0.1:9/x",
    "timm/test_vit@../canary/mine",
    "timm/resnet50",
    "<f8",
    "float64",
    "object",
    "|O",
)

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    255,
    65_536,
    2**31,
    10**12,
    2**53 + 1,
    2**63,
    2**64 - 1,
    2**70,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)

MADE = (
    {MAKE: "deep list"},
    {MAKE: "deep object"},
    {MAKE: "long text"},
    {MAKE: "long list"},
    {MAKE: "wide object"},
    {MAKE: "long number"},
    {MAKE: "1e999"},
    {MAKE: "surrogate"},
)

VALUES = (
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    [0],
    [10**12],
    [2**40, 2**40],
    {"": ""},
    {"a": None},
    {"../x": {}},
    *TEXTS,
    *NUMBERS,
    *MADE,
)


def values() -> "st.SearchStrategy[Any]":
    """Return hostile values: mostly known ones, now and then anything."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    anything = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v))
    return st.one_of(*[st.sampled_from(VALUES)] * 5, anything)


def written(document: Any) -> bytes:
    """Return a document as JSON, with what it only describes written out."""
    return fill_in(json.dumps(document)).encode("utf-8", "surrogatepass")


def fill_in(text: str) -> str:
    """Replace descriptions in JSON text by what they describe."""
    made = {
        "deep list": "[" * DEEP + "]" * DEEP,
        "deep object": '{"a":' * DEEP + "0" + "}" * DEEP,
        "long text": json.dumps("é" + "x" * LONG),
        "long list": "[" + "0," * LONG + "0]",
        "wide object": "{" + ",".join(f'"{i}":0' for i in range(LONG // 10)) + "}",
        "long number": "9" * 5000,
        "1e999": "1e999",
        "surrogate": '"\\ud800"',
    }
    for name, value in made.items():
        text = text.replace(json.dumps({MAKE: name}), value)
    return text
