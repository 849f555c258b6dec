"""Tables and progress lines that fit the terminal: what is cut, and what is shown otherwise."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress as Bars
from rich.progress import Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sfm.text import make_encodable, sanitize_line

PIPED_WIDTH = 140
MIN_CELL_WIDTH = 12
"""A column of text is not folded to fewer characters than this: the rows are shown as lists instead."""

MAX_CELL_LENGTH = 400
COLUMN_GAP = "  "
"""Between the columns of a table that is too wide for a box."""
BAR_WIDTHS = 30, 10, 6
"""At most, at least, and at least on a terminal that is narrower than ``WIDE_TERMINAL``."""

WIDE_TERMINAL = 60
SHORTENED_COLUMNS = ("what", "figures")
"""What is cut in a progress line, the first first."""

MIN_TEXT_WIDTH, MIN_TEXT_WIDTH_IF_WIDE = 8, 16
"""To how many characters; of the description, on a terminal that is not narrow, the second."""


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that takes text as it is: no markup, no emoji codes, no highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def fit_to_line(text: str, console: Console, max_length: int | None = None) -> str:
    """Return text as one line that a console can print."""
    return make_encodable(sanitize_line(text, max_length), console.encoding)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: set[str]
) -> None:
    """Print a table: in a box; without one, words folded, on a narrower terminal; as lists on a narrow one.

    Where the output is no terminal, nothing is folded or cut.

    Parameters
    ----------
    right : set of str
        Columns that are aligned right.
    """
    cells = [[fit_to_line(cell, console, MAX_CELL_LENGTH) for cell in row] for row in rows]
    heads = [fit_to_line(column, console) for column in columns]
    natural = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
    frame = 3 * len(columns) + 1
    if not console.is_terminal:
        console.width = max(PIPED_WIDTH, sum(natural) + frame)
    console.print(fit_to_line(title, console), style="bold", soft_wrap=True)
    # A digest or a number is of no use in pieces; words are.
    least = [
        max(map(cell_len, [*column, *head.split()])) if name in right else min(width, MIN_CELL_WIDTH)
        for name, head, width, *column in zip(columns, heads, natural, *cells, strict=True)
    ]
    boxed = sum(natural) + frame <= console.width
    if not boxed and sum(least) + len(COLUMN_GAP) * (len(columns) - 1) > console.width:
        print_rows_as_lists(console, heads, cells)
        return
    look: dict[str, Any] = (
        {} if boxed else {"box": None, "padding": (0, len(COLUMN_GAP), 0, 0), "pad_edge": False}
    )
    shown = Table(header_style="bold", **look)
    for name, head, width in zip(columns, heads, least, strict=True):
        justify = "right" if name in right else "left"
        shown.add_column(head, justify=justify, overflow="fold", min_width=width)  # type: ignore[arg-type]
    for row in cells:
        shown.add_row(*row)
    console.print(shown)


def print_rows_as_lists(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as lists of ``name: value``; the terminal wraps what is too long."""
    for row in rows:
        for head, cell in zip(heads, row, strict=True):
            console.print(Text.assemble((f"{head}: ", "bold"), cell), soft_wrap=True)
        console.print()


class FittedProgress(Bars):
    """Progress lines that keep bar, count and time left, whatever the width.

    The description is cut first, then the figures; then figures, unit, time spent and description go.
    """

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Lay out the lines of all visible tasks for the width of the console."""
        shown = [task for task in tasks if task.visible]
        if not shown:
            # As at the start, when there is no console yet.
            return Table.grid()
        return arrange_progress_lines(
            [make_progress_cells(task, self.console) for task in shown], self.console.width
        )


def make_progress_cells(task: Task, console: Console) -> dict[str, str | Task]:
    """Return what there is to show of a task."""
    total = "?" if task.total is None else f"{task.total:.0f}"
    left = task.time_remaining
    unit = task.fields.get("unit", "")
    return {
        "what": fit_to_line(task.description, console),
        "bar": task,
        "count": f"{task.completed:.0f}/{total}",
        "unit": fit_to_line(unit, console),
        "figures": fit_to_line(task.fields.get("figures", ""), console),
        "spent": format_clock(task.elapsed),
        "left": "" if task.finished else f"{format_clock(left)} left",
    }


def format_clock(seconds: float | None) -> str:
    """Return a time as ``m:ss`` or ``h:mm:ss``; dashes for one that is not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def arrange_progress_lines(lines: Sequence[dict[str, str | Task]], width: int) -> Table:
    """Return progress lines as a grid that is no wider than a terminal."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    names = list(lines[0])
    width += 1  # No blank follows the last column.
    wide = {n: max(cell_len(str(line[n])) for line in lines) for n in names if n != "bar"}
    widest, least, narrow = BAR_WIDTHS
    wide["bar"] = least if width >= WIDE_TERMINAL else narrow
    cut_to = {n: min(wide[n], MIN_TEXT_WIDTH) for n in SHORTENED_COLUMNS}
    if width >= WIDE_TERMINAL:
        cut_to["what"] = min(wide["what"], MIN_TEXT_WIDTH_IF_WIDE)
    # The description is cut first, then the figures; then the least important goes.
    for dropped in ("figures", "unit", "spent", "what", "bar"):
        shown = [n for n in names if wide[n]]
        fixed = sum(wide[n] + 1 for n in shown if n not in SHORTENED_COLUMNS)
        room = width - fixed - sum(cut_to[n] + 1 for n in SHORTENED_COLUMNS if n in shown)
        if room >= 0:
            break
        wide[dropped] = 0
    shown = [n for n in names if wide[n]]
    room = width - sum(wide[n] + 1 for n in shown if n not in SHORTENED_COLUMNS)
    for cut in (n for n in SHORTENED_COLUMNS if n in shown):
        # What is cut first leaves the other as much as it wants, and keeps its least.
        others = sum(wide[n] + 1 for n in SHORTENED_COLUMNS if n in shown and n != cut)
        wide[cut] = max(min(wide[cut], room - others - 1), cut_to[cut])
    if "bar" in shown:
        wide["bar"] = min(widest, wide["bar"] + max(0, width - sum(wide[n] + 1 for n in shown)))
    for name in shown:
        grid.add_column(width=wide[name], no_wrap=True, overflow="ellipsis")
    for line in lines:
        grid.add_row(*(render_progress_cell(line[name], wide[name]) for name in shown))
    return grid


def render_progress_cell(value: str | Task, width: int) -> RenderableType:
    """Return a text, or a task's bar."""
    if isinstance(value, str):
        return Text(value, no_wrap=True, overflow="ellipsis")
    return ProgressBar(total=value.total, completed=value.completed, width=width)
