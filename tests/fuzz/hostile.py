"""Values that a hostile writer puts where something else belongs."""

import json
from random import Random
from typing import Any

MAKE = "$make"
"""Marks a value that is described rather than written out: long, deep, or no JSON at all."""

LONG, DEEP = 100_000, 20_000

FISH = b"fish-2".hex().ljust(32, "0")
"""Run of another entry, see `seeds.make_run_id`."""

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
    FISH,
    f"{FISH}/",
    f"{FISH}/train",
    f"../runs/{FISH}",
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

GENERATED_TEXTS = (
    {MAKE: "deep list"},
    {MAKE: "deep object"},
    {MAKE: "long text"},
    {MAKE: "long list"},
    {MAKE: "wide object"},
    {MAKE: "long number"},
    {MAKE: "1e999"},
    {MAKE: "surrogate"},
)

PLAIN = (
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
)


def draw_value(rng: Random, like: Any = None) -> Any:
    """Draw a hostile value: mostly one of those above, half of them of the type that belongs there."""
    if rng.random() < 0.5:
        if isinstance(like, str):
            return rng.choice(TEXTS)
        if isinstance(like, int | float) and not isinstance(like, bool):
            return rng.choice(NUMBERS)
    if rng.random() < 0.9:
        return rng.choice(rng.choice((PLAIN, TEXTS, TEXTS, NUMBERS, NUMBERS, GENERATED_TEXTS)))
    own = [draw_value(rng) for _ in range(rng.randrange(4))]
    return own if rng.random() < 0.5 else {rng.choice(TEXTS): value for value in own}


def encode_hostile_json(document: Any) -> bytes:
    """Return a document as JSON, with what it only describes written out."""
    return expand_placeholders(json.dumps(document)).encode("utf-8", "surrogatepass")


def expand_placeholders(text: str) -> str:
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
