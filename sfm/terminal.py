"""What a person sees: progress, tables, one line per error."""

import errno
import io
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import TaskID

from sfm.errors import DamageError, InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.interrupts import allow_keyboard_interrupt
from sfm.layout import FittedProgress, fit_to_line, open_console, print_table
from sfm.text import ENCODE_ERROR_HANDLER, sanitize_line

PROGRESS_LINE_SECONDS = 10.0
EXIT_UNFINISHED = 1
EXIT_INTERRUPTED = 130

MAX_ERROR_LENGTH = 4000
"""Characters of an error: a name in it may have been made to fill the screen."""


class OneLineFormatter(logging.Formatter):
    """Log messages as one line each, fit for a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the message of a record."""
        return sanitize_line(super().formatMessage(record))


def configure_output() -> None:
    """Make sure that no text can break the output: what an encoding lacks is degraded, logs are one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ENCODE_ERROR_HANDLER)
    if logging.lastResort:
        logging.lastResort.setFormatter(OneLineFormatter())


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print one line, whatever the text holds."""
    print(sanitize_line(text), file=file)


def report_error(message: str, status: int) -> typer.Exit:
    """Print one line on stderr and return the exit to raise."""
    print_line(f"error: {sanitize_line(message, MAX_ERROR_LENGTH)}", file=sys.stderr)
    return typer.Exit(status)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn what went wrong into one line and an exit status: 2 bad input, 1 damage, 130 interrupted."""
    allow_keyboard_interrupt()
    try:
        yield
    except InputError as error:
        raise report_error(str(error), 2) from None
    except (DamageError, FloatingPointError) as error:
        raise report_error(str(error), 1) from None
    except KeyboardInterrupt:
        raise report_error("interrupted", EXIT_INTERRUPTED) from None
    except Exception as error:
        reason = describe_disk_error(error) or describe_memory_error(error)
        if reason is None:
            raise
        raise report_error(reason, 2) from None


@contextmanager
def explain_interrupt(message: str | Callable[[], str]) -> Iterator[None]:
    """Say what an interrupted command leaves, and how to go on if it can; a function is asked then."""
    try:
        yield
    except KeyboardInterrupt:
        left = message if isinstance(message, str) else message()
        raise report_error(f"interrupted{left}", EXIT_INTERRUPTED) from None


def describe_memory_error(error: BaseException) -> str | None:
    """Return a line for memory that is not there, on the CPU or a GPU; None for anything else."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"not enough memory: ask for fewer images or views at a time ({text})"
    return None


def describe_disk_error(error: BaseException) -> str | None:
    """Return a line for a full disk or a place that cannot be written; None for anything else.

    Object stores report a full disk as an error of their own, with the system's words in it.
    """
    text = str(error).partition("\n")[0]
    where = getattr(error, "filename", None)
    at = f" at {where}" if where else ""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"no space left on the disk{at}: free some and run the same command again ({text})"
    if isinstance(error, PermissionError) or "Permission denied" in text:
        return f"permission denied{at}: {text}"
    return None


@contextmanager
def show_progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Show progress on stderr: bars in a terminal, a line now and then elsewhere."""
    if quiet:
        yield no_progress
        return
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield make_line_printer(console)
        return
    with FittedProgress(console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: Progress) -> None:
            print_note(console, event.note)
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, figures="", unit="")
            bars.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total,
                unit=event.unit,
                figures=format_figures(event, " "),
            )

        yield show


def make_line_printer(console: Console) -> ProgressCallback:
    """Return a listener that prints a stage's first and last event, and one every few seconds between."""
    began: dict[str, float] = {}
    printed: dict[str, float] = {}

    def show(event: Progress) -> None:
        print_note(console, event.note)
        now = time.monotonic()
        first = event.stage not in began
        start = began.setdefault(event.stage, now)
        last = event.done == event.total
        if first or last or now - printed[event.stage] >= PROGRESS_LINE_SECONDS:
            printed[event.stage] = now
            seconds = now - start
            left = f", {seconds / event.done * (event.total - event.done):.0f} s left" if event.done else ""
            tail = "" if first or last else left
            count = f"{event.done}/{event.total} {event.unit}"
            line = f"{event.stage}: {count} {format_figures(event, ', ')}".rstrip()
            console.print(fit_to_line(f"{line}, {seconds:.0f} s{tail}", console), soft_wrap=True)

    return show


def print_note(console: Console, note: str) -> None:
    """Print what the user should know now, if there is anything."""
    if note:
        console.print(sanitize_line(f"note: {note}"), highlight=False, markup=False, soft_wrap=True)


def format_figures(event: Progress, between: str) -> str:
    """Return an event's figures as text."""
    return between.join(f"{name} {value:.4g}" for name, value in event.figures.items())


def print_next_command(*words: object) -> None:
    """Print the command to go on with, fit to be pasted into a shell."""
    print_line(f"Next: {shlex.join(['sfm', *map(str, words)])}")


def print_json(document: Any) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(document, indent=1))  # noqa: T201


def print_entry_table(title: str, entries: Sequence[Any], outcomes: Sequence[str] = ()) -> None:
    """Print summaries of entries, with what became of them if they were just published."""
    columns = ["dataset", "digest", "backbone", "px", "role", "classes", "train", "held out", "top-1 %"]
    rows = [
        [
            s.dataset,
            s.entry_digest[:12],
            s.backbone,
            str(s.image_size),
            s.role,
            str(s.classes),
            str(s.train_samples),
            str(s.test_samples),
            format_percent(s.held_out_top1),
        ]
        for s in entries
    ]
    if outcomes:
        columns.append("outcome")
        rows = [[*row, outcome] for row, outcome in zip(rows, outcomes, strict=True)]
    table(title, columns, rows, right={"px", "classes", "train", "held out", "top-1 %"})


IMAGE_LABELS = {
    "distilled": "distilled",
    "none": "none, class means",
    "random": "real, random",
    "nearest": "real, nearest to the mean",
    "neighbour": "real, nearest to the distilled",
}


def print_accuracy_table(record: dict[str, Any]) -> None:
    """Print the rows of an evaluation."""
    rows = [
        [
            IMAGE_LABELS[row["images"]] + (f", of {row['exemplars']}" if row["exemplars"] else ""),
            row["backbone"],
            row["mode"],
            format_over_seeds(row, "top1"),
            format_over_seeds(row, "top5"),
            format_percent(row["recovered"]),
            str(row["seeds"]),
        ]
        for row in record["rows"]
    ]
    rows += [
        [
            row["images"],
            row["backbone"],
            row["classifier"],
            format_percent(row["top1"]),
            format_percent(row["top5"]),
            format_percent(row["recovered"]),
            "–",
        ]
        for row in record["full_data"]
    ]
    columns = ["images", "backbone", "trained", "top-1 %", "top-5 %", "of full data %", "seeds"]
    title = (
        f"Accuracy on held-out features: {shorten_path(record['config']['run'])}, "
        f"distilled on {record['provenance']['distilled_on']}"
    )
    table(title, columns, rows, right={"top-1 %", "top-5 %", "of full data %", "seeds"})
    for note in record["notes"]:
        print_line(f"note: {note}")


def shorten_path(path: str) -> str:
    """Return a path as a person would write it in this folder."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def print_matrix_table(cells: Sequence[dict[str, Any]]) -> None:
    """Print the cross-backbone matrix of several evaluations: a block of rows per mode."""
    backbones = list(dict.fromkeys(cell["backbone"] for cell in cells))
    modes = dict.fromkeys(cell["mode"] for cell in cells)
    runs = dict.fromkeys((cell["run"], cell["distilled_on"]) for cell in cells)
    at = {(cell["mode"], cell["run"], cell["backbone"]): cell for cell in cells}
    rows = []
    for mode in modes:
        for run, distilled_on in runs:
            found = [at.get((mode, run, backbone)) for backbone in backbones]
            shown = [
                format_over_seeds(cell, "top1") + cell.get("mark", "") if cell else "–" for cell in found
            ]
            rows.append([mode, distilled_on, shorten_path(run), *shown])
    columns = ["trained", "distilled on", "run", *backbones]
    table("Top-1 %, by the backbone evaluated on", columns, rows, right=set(backbones))


def format_over_seeds(row: dict[str, Any], figure: str) -> str:
    """Return a row's mean in percent, with its deviation if there were several seeds."""
    return format_percent(row[f"{figure}_mean"], row[f"{figure}_std"] if row["seeds"] > 1 else None)


def print_plan_table(plan: Any) -> None:
    """Print what an extraction would do."""
    about = "" if plan.counted else "about "
    images = sum(plan.samples.values())
    rows = [
        [
            "classes",
            f"{plan.classes_met:,} in the first shards, all known after the pass"
            if plan.classes is None
            else f"{plan.classes:,}",
        ],
        *([f"{split} images", f"{about}{count:,}"] for split, count in plan.samples.items()),
        ["partitions", f"{plan.partitions:,}"],
        *(
            [
                "backbone",
                f"{b.backbone} at {b.image_size} px, {b.features:,} features, {b.backbone_hash[:12]}",
            ]
            for b in plan.backbones
        ),
        ["entries to publish", str(plan.entries)],
        ["probe", f"{plan.probed} images, {plan.undecodable} of them cannot be decoded"],
        *([["", f"{plan.composited} are not opaque: they go over ?background="]] if plan.composited else []),
        *([["", f"{plan.dark} are nearly black: say which value is ?white="]] if plan.dark else []),
        ["rate here", f"{plan.images_per_second:.0f} images/s"],
        ["pass over the images", f"about {format_duration(plan.seconds)} for {about}{images:,} images"],
        [
            "statistics after it",
            "known after the pass"
            if plan.statistics_seconds is None
            else f"about {format_duration(plan.statistics_seconds)} for classifiers and sub-class centres",
        ],
        ["staging, until done", f"about {plan.staging_bytes / 2**20:,.0f} MiB"],
        ["store, at most", f"about {plan.store_bytes / 2**20:,.0f} MiB"],
    ]
    table(f"Plan for {plan.source}", ["what", "how much"], rows, right=set())


def format_duration(seconds: float) -> str:
    """Return a time that a person can read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(title: str, columns: list[str], rows: list[list[str]], right: set[str]) -> None:
    """Print a table that a person can read; the columns in `right` are aligned so."""
    print_table(open_console(), title, columns, rows, right)


def format_percent(fraction: float | None, spread: float | None = None) -> str:
    """Return a fraction in percent, with its deviation if there is one; a dash for None."""
    if fraction is None:
        return "–"
    return f"{100 * fraction:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
