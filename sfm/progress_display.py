"""Progress on stderr: bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress as ProgressBars
from rich.progress import Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sfm.events import Progress, ProgressCallback, no_progress
from sfm.terminal import open_console, sanitize_line_for_console
from sfm.text import sanitize_line

PROGRESS_LINE_SECONDS = 10.0
"""Time between two lines of a stage where there is no terminal."""

MAX_BAR_WIDTH, MIN_BAR_WIDTH, MIN_BAR_WIDTH_IF_NARROW = 30, 10, 6

WIDE_TERMINAL = 60
"""Columns from which a terminal is not narrow."""

TEXT_COLUMNS = ("description", "figures")
"""Columns of a progress line that may be shortened, the first one first."""

MIN_TEXT_WIDTH, MIN_DESCRIPTION_WIDTH = 8, 16
"""Width that a text column keeps; on a terminal that is not narrow, the description keeps the second."""


@contextmanager
def show_progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Yield a callback that shows progress on stderr: bars in a terminal, plain lines elsewhere."""
    if quiet:
        yield no_progress
        return
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield make_progress_line_printer(console)
        return
    with FittedProgressBars(console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def update_bar(event: Progress) -> None:
            print_note(console, event.note)
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, figures="", unit="")
            bars.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total,
                unit=event.unit,
                figures=format_event_figures(event, " "),
            )

        yield update_bar


def make_progress_line_printer(console: Console) -> ProgressCallback:
    """Return a callback that prints the first and last event of a stage, and one every few seconds."""
    start_times: dict[str, float] = {}
    print_times: dict[str, float] = {}

    def print_progress(event: Progress) -> None:
        print_note(console, event.note)
        now = time.monotonic()
        is_first = event.stage not in start_times
        seconds = now - start_times.setdefault(event.stage, now)
        is_last = event.done == event.total
        if is_first or is_last or now - print_times[event.stage] >= PROGRESS_LINE_SECONDS:
            print_times[event.stage] = now
            count = f"{event.done}/{event.total} {event.unit}"
            line = (
                f"{event.stage}: {count} {format_event_figures(event, ', ')}".rstrip() + f", {seconds:.0f} s"
            )
            if event.done and not (is_first or is_last):
                line += f", {seconds / event.done * (event.total - event.done):.0f} s left"
            console.print(sanitize_line_for_console(line, console), soft_wrap=True)

    return print_progress


def print_note(console: Console, note: str) -> None:
    """Print the note of a progress event, if it has one."""
    if note:
        console.print(sanitize_line(f"note: {note}"), highlight=False, markup=False, soft_wrap=True)


def format_event_figures(event: Progress, separator: str) -> str:
    """Return the figures of a progress event as text."""
    return separator.join(f"{name} {value:.4g}" for name, value in event.figures.items())


class FittedProgressBars(ProgressBars):
    """Progress bars that keep bar, count and time left at any width of the terminal.

    The description is shortened first, then the figures; then figures, unit, time spent and description
    are left out.
    """

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Return the lines of all visible tasks, fitted to the width of the console."""
        visible = [task for task in tasks if task.visible]
        if not visible:
            # As at the start, when there is no console yet.
            return Table.grid()
        return make_progress_grid(
            [make_progress_cells_by_column(task, self.console) for task in visible], self.console.width
        )


def make_progress_cells_by_column(task: Task, console: Console) -> dict[str, str | Task]:
    """Return the cells of a task's progress line, by column; the bar's cell is the task."""
    total = "?" if task.total is None else f"{task.total:.0f}"
    return {
        "description": sanitize_line_for_console(task.description, console),
        "bar": task,
        "count": f"{task.completed:.0f}/{total}",
        "unit": sanitize_line_for_console(task.fields.get("unit", ""), console),
        "figures": sanitize_line_for_console(task.fields.get("figures", ""), console),
        "spent": format_seconds_as_clock(task.elapsed),
        "left": "" if task.finished else f"{format_seconds_as_clock(task.time_remaining)} left",
    }


def format_seconds_as_clock(seconds: float | None) -> str:
    """Return a time as ``m:ss`` or ``h:mm:ss``; dashes if it is not known."""
    if seconds is None:
        return "-:--"
    minutes, remaining_seconds = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{remaining_seconds:02d}"
        if minutes >= 60
        else f"{minutes}:{remaining_seconds:02d}"
    )


def make_progress_grid(lines: Sequence[dict[str, str | Task]], terminal_width: int) -> Table:
    """Return progress lines as a grid that is no wider than the terminal."""
    widths = fit_column_widths(lines, terminal_width)
    grid = Table.grid(padding=(0, 1, 0, 0))
    for width in widths.values():
        grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
    for line in lines:
        grid.add_row(*(render_progress_cell(line[name], width) for name, width in widths.items()))
    return grid


def fit_column_widths(lines: Sequence[dict[str, str | Task]], terminal_width: int) -> dict[str, int]:
    """Return the width of every column of progress lines that fits the terminal."""
    names = list(lines[0])
    is_wide = terminal_width + 1 >= WIDE_TERMINAL
    available = terminal_width + 1  # Every column is followed by a blank, but for the last.
    widths = {n: max(cell_len(str(line[n])) for line in lines) for n in names if n != "bar"}
    widths["bar"] = MIN_BAR_WIDTH if is_wide else MIN_BAR_WIDTH_IF_NARROW
    min_widths = {n: min(widths[n], MIN_TEXT_WIDTH) for n in TEXT_COLUMNS}
    if is_wide:
        min_widths["description"] = min(widths["description"], MIN_DESCRIPTION_WIDTH)
    for dropped_column in ("figures", "unit", "spent", "description", "bar"):
        shown_columns = [n for n in names if widths[n]]
        fixed_width = sum(widths[n] + 1 for n in shown_columns if n not in TEXT_COLUMNS)
        if available >= fixed_width + sum(min_widths[n] + 1 for n in TEXT_COLUMNS if n in shown_columns):
            break
        widths[dropped_column] = 0
    shown_columns = [n for n in names if widths[n]]
    text_width = available - sum(widths[n] + 1 for n in shown_columns if n not in TEXT_COLUMNS)
    for name in (n for n in TEXT_COLUMNS if n in shown_columns):
        # The column that is shortened first leaves the other as much as it wants, and keeps its minimum.
        other_widths = sum(widths[n] + 1 for n in TEXT_COLUMNS if n in shown_columns and n != name)
        widths[name] = max(min(widths[name], text_width - other_widths - 1), min_widths[name])
    if "bar" in shown_columns:
        unused = max(0, available - sum(widths[n] + 1 for n in shown_columns))
        widths["bar"] = min(MAX_BAR_WIDTH, widths["bar"] + unused)
    return {name: widths[name] for name in shown_columns}


def render_progress_cell(cell: str | Task, bar_width: int) -> RenderableType:
    """Return the rich renderable of a cell: a text, or a task's bar."""
    if isinstance(cell, str):
        return Text(cell, no_wrap=True, overflow="ellipsis")
    return ProgressBar(total=cell.total, completed=cell.completed, width=bar_width)
