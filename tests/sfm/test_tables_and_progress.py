"""Tables and progress lines at every width, in every encoding, of every name."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from sfm.events import Progress
from sfm.progress_display import FittedProgressBars, make_progress_line_printer, show_progress
from sfm.tables import describe_target_estimate, print_entry_table, print_table
from sfm.terminal import open_console

COLUMNS = ["dataset", "digest", "backbone", "px", "role", "classes", "top-1 %"]
ROW = [
    "birds of the north",
    "0123456789ab",
    "timm/vit_base_patch14_dinov2.lvd142m",
    "224",
    "full",
    "200",
    "87.5",
]


def make_console(width: int, *, terminal: bool = True, encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    options = {"markup": False, "emoji": False, "highlight": False, "color_system": None}
    return Console(file=file, width=width, force_terminal=terminal, **options), raw


def print_to_lines(width: int, rows: list[list[str]], *, title: str = "Store st", **how: object) -> list[str]:
    console, raw = make_console(width, **how)
    print_table(title, COLUMNS, rows, {"px", "classes"}, console)
    return raw.getvalue().decode(console.encoding).splitlines()


@pytest.mark.parametrize("width", [20, 40])
def test_table_on_a_narrow_terminal_lists_each_row_vertically(width):
    lines = print_to_lines(width, [ROW, ROW])
    assert lines[1:8] == [f"{name}: {value}" for name, value in zip(COLUMNS, ROW, strict=True)]
    assert lines[8] == ""


@pytest.mark.parametrize("width", [80, 70])
def test_table_on_a_medium_terminal_wraps_words_but_not_digests_or_numbers(width):
    lines = print_to_lines(width, [ROW, ROW])
    assert all(len(line) <= width for line in lines)
    assert sum("0123456789ab" in line and " 200 " in line and "87.5" in line for line in lines) == 2


def test_table_without_a_terminal_is_neither_wrapped_nor_truncated():
    row = [*ROW[:2], "x" * 300, *ROW[3:]]
    lines = print_to_lines(20, [row], terminal=False, title="A title that is longer than a narrow terminal")
    assert lines[0] == "A title that is longer than a narrow terminal"
    assert sum("0123456789ab" in line and "x" * 300 in line for line in lines) == 1


@pytest.mark.parametrize("name", ["pets [raw]", "pets[/raw]", "[b]", "[link=http://evil/]x[/link]", ":dog:"])
def test_rich_markup_in_names_is_printed_literally(name, capsys):
    lines = print_to_lines(200, [[name, *ROW[1:]]], title=name)
    assert lines[0] == name
    assert any(f" {name} " in line for line in lines)
    console = open_console()
    console.print(name)
    assert capsys.readouterr().out == f"{name}\n"


def test_line_breaks_and_escape_sequences_in_table_cells_are_escaped():
    (line,) = [line for line in print_to_lines(200, [["cat\nFelis\x1b[2J", *ROW[1:]]]) if "Felis" in line]
    assert r"cat\nFelis\x1b[2J" in line


def test_ascii_terminal_gets_an_aligned_ascii_table():
    lines = print_to_lines(200, [["café – 猫", *ROW[1:]]], encoding="ascii")
    assert any(r"caf\xe9 - \u732b" in line for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1


STAGE = "statistics of timm/vit_base_patch14_dinov2.lvd142m"
FIGURES = {"images/s": 312.5, "partitions left": 12, "decode ms": 1.25}


@pytest.mark.parametrize("width", [80, 40, 30])
def test_progress_bar_fits_the_width_with_bar_count_and_time_left(width):
    console, raw = make_console(width)
    with FittedProgressBars(console=console, auto_refresh=False) as bars:
        task = bars.add_task(STAGE, total=60000, figures="images/s 312.5", unit="images")
        bars.update(task, completed=30000)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.getvalue().decode())
    line = next(part for part in re.split(r"[\r\n]+", text) if "30000" in part).rstrip()
    assert len(line) <= width
    assert "30000/60000" in line
    assert line.endswith("left")
    assert "━━━" in line
    if width >= 40:
        assert line.startswith("statist")


def test_progress_without_a_terminal_prints_plain_lines():
    console, raw = make_console(80, terminal=False)
    show = make_progress_line_printer(console)
    show(Progress("statistics of pets[/raw]\x1b[2J", 1, 2, "parts", FIGURES))
    line = raw.getvalue().decode()
    assert line.startswith(r"statistics of pets[/raw]\x1b[2J: 1/2 parts images/s 312.5")
    assert line.count("\n") == 1


def test_progress_bar_escapes_markup_and_control_characters():
    console, raw = make_console(100)
    with FittedProgressBars(console=console, auto_refresh=False) as bars:
        bars.add_task("a[/b]\n\x1b[2J", total=None)
    assert rb"a[/b]\n\x1b[2J" in raw.getvalue()


@pytest.mark.parametrize(
    ("corrected", "text"),
    [
        (None, "lite0: accuracy of a head on drawn samples: 70.0 %"),
        (
            0.818,
            "lite0: accuracy of a head on drawn samples: 81.8 %, on the real centres 70.0 %; cosine of the "
            "flows 0.900",
        ),
    ],
)
def test_target_estimate_of_a_plan_is_an_accuracy_on_drawn_samples(corrected, text):
    targets = SimpleNamespace(ceilings=SimpleNamespace(real=0.7, corrected=corrected), cosine=0.9)
    assert describe_target_estimate(targets, "lite0") == text


def test_quiet_hides_progress(capsys):
    with show_progress(quiet=True) as show:
        show(Progress("features", 1, 2))
    assert capsys.readouterr().err == ""


def test_empty_listing_prints_a_table_without_rows(capsys):
    print_entry_table("Store st: 0 entries", [])
    assert capsys.readouterr().out.startswith("Store st: 0 entries\n")
