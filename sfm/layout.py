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

from sfm.text import encodable, one_line

PIPED_WIDTH = 140
LEAST_CELL = 12
"""A column of text is not folded to fewer characters than this: the rows are shown as lists instead."""

LONGEST_CELL = 400
COLUMN_GAP = "  "
"""Between the columns of a table that is too wide for a box."""
BAR_WIDTHS = 30, 10, 6
"""At most, at least, and at least on a terminal that is narrower than ``WIDE``."""

WIDE = 60
CUT = ("what", "figures")
"""What is cut in a progress line, the first first."""

LEAST_TEXT, LEAST_TEXT_IF_WIDE = 8, 16
"""To how many characters; of the description, on a terminal that is not narrow, the second."""


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that takes text as it is: no markup, no emoji codes, no highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def fit(text: str, console: Console, most: int | None = None) -> str:
    """Return text as one line that a console can print."""
    return encodable(one_line(text, most), console.encoding)


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
    cells = [[fit(cell, console, LONGEST_CELL) for cell in row] for row in rows]
    heads = [fit(column, console) for column in columns]
    natural = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
    frame = 3 * len(columns) + 1
    if not console.is_terminal:
        console.width = max(PIPED_WIDTH, sum(natural) + frame)
    console.print(fit(title, console), style="bold", soft_wrap=True)
    # A digest or a number is of no use in pieces; words are.
    least = [
        max(map(cell_len, [*column, *head.split()])) if name in right else min(width, LEAST_CELL)
        for name, head, width, *column in zip(columns, heads, natural, *cells, strict=True)
    ]
    boxed = sum(natural) + frame <= console.width
    if not boxed and sum(least) + len(COLUMN_GAP) * (len(columns) - 1) > console.width:
        print_lists(console, heads, cells)
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


def print_lists(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as lists of ``name: value``; the terminal wraps what is too long."""
    for row in rows:
        for head, cell in zip(heads, row, strict=True):
            console.print(Text.assemble((f"{head}: ", "bold"), cell), soft_wrap=True)
        console.print()


class FittingBars(Bars):
    """Progress lines that keep bar, count and time left, whatever the width.

    The description is cut first, then the figures; then figures, unit, time spent and description go.
    """

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Lay out the lines of all visible tasks for the width of the console."""
        shown = [task for task in tasks if task.visible]
        if not shown:
            # As at the start, when there is no console yet.
            return Table.grid()
        return lay_out([progress_cells(task, self.console) for task in shown], self.console.width)


def progress_cells(task: Task, console: Console) -> dict[str, str | Task]:
    """Return what there is to show of a task."""
    total = "?" if task.total is None else f"{task.total:.0f}"
    left = task.time_remaining
    unit = task.fields.get("unit", "")
    return {
        "what": fit(task.description, console),
        "bar": task,
        "count": f"{task.completed:.0f}/{total}",
        "unit": fit(unit, console),
        "figures": fit(task.fields.get("figures", ""), console),
        "spent": clock(task.elapsed),
        "left": "" if task.finished else f"{clock(left)} left",
    }


def clock(seconds: float | None) -> str:
    """Return a time as ``m:ss`` or ``h:mm:ss``; dashes for one that is not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def lay_out(lines: Sequence[dict[str, str | Task]], width: int) -> Table:
    """Return progress lines as a grid that is no wider than a terminal."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    names = list(lines[0])
    width += 1  # No blank follows the last column.
    wide = {n: max(cell_len(str(line[n])) for line in lines) for n in names if n != "bar"}
    most, least, narrow = BAR_WIDTHS
    wide["bar"] = least if width >= WIDE else narrow
    cut_to = {n: min(wide[n], LEAST_TEXT) for n in CUT}
    if width >= WIDE:
        cut_to["what"] = min(wide["what"], LEAST_TEXT_IF_WIDE)
    # The description is cut first, then the figures; then the least important goes.
    for dropped in ("figures", "unit", "spent", "what", "bar"):
        shown = [n for n in names if wide[n]]
        fixed = sum(wide[n] + 1 for n in shown if n not in CUT)
        room = width - fixed - sum(cut_to[n] + 1 for n in CUT if n in shown)
        if room >= 0:
            break
        wide[dropped] = 0
    shown = [n for n in names if wide[n]]
    room = width - sum(wide[n] + 1 for n in shown if n not in CUT)
    for cut in (n for n in CUT if n in shown):
        # What is cut first leaves the other as much as it wants, and keeps its least.
        others = sum(wide[n] + 1 for n in CUT if n in shown and n != cut)
        wide[cut] = max(min(wide[cut], room - others - 1), cut_to[cut])
    if "bar" in shown:
        wide["bar"] = min(most, wide["bar"] + max(0, width - sum(wide[n] + 1 for n in shown)))
    for name in shown:
        grid.add_column(width=wide[name], no_wrap=True, overflow="ellipsis")
    for line in lines:
        grid.add_row(*(progress_cell(line[name], wide[name]) for name in shown))
    return grid


def progress_cell(value: str | Task, width: int) -> RenderableType:
    """Return a text, or a task's bar."""
    if isinstance(value, str):
        return Text(value, no_wrap=True, overflow="ellipsis")
    return ProgressBar(total=value.total, completed=value.completed, width=width)
