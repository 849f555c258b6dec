"""Tables on stdout: in a box, without one, or as lists, as wide as the terminal allows."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfm.terminal import open_console, sanitize_line_for_console
from sfm.text import format_percent

if TYPE_CHECKING:
    from sfm.distill.run_estimate import DistillationEstimate
    from sfm.distill.target_estimate import TargetEstimate
    from sfm.pipeline.dry_run import ExtractionEstimate
    from sfm.stats_store.cards import Summary

MIN_PIPED_WIDTH = 140
"""Width of a table that goes to a file or a pipe, at least."""

MIN_CELL_WIDTH = 12
"""A column of text is not folded to fewer characters: the rows are printed as lists instead."""

MAX_CELL_LENGTH = 400

COLUMN_GAP = "  "
"""Between the columns of a table that is too wide for a box."""

IMAGE_LABELS = {
    "distilled": "distilled",
    "none": "none, class means",
    "random": "real, random",
    "nearest": "real, nearest to the mean",
    "neighbour": "real, nearest to the distilled",
}


def print_table(
    title: str,
    column_heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    right_aligned_heads: set[str],
    console: Console | None = None,
) -> None:
    """Print a table: in a box if it fits; else without one, words folded; else as lists.

    Where the output is no terminal, nothing is folded or shortened.

    Parameters
    ----------
    title : str
    column_heads : sequence of str
    rows : sequence of sequences of str
    right_aligned_heads : set of str
        Columns that are aligned right and never folded.
    console : Console, optional
        Where to print; stdout if not given.
    """
    console = console or open_console()
    cells = [[sanitize_line_for_console(cell, console, MAX_CELL_LENGTH) for cell in row] for row in rows]
    heads = [sanitize_line_for_console(column, console) for column in column_heads]
    widths = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
    boxed_width = sum(widths) + 3 * len(column_heads) + 1
    if not console.is_terminal:
        console.width = max(MIN_PIPED_WIDTH, boxed_width)
    console.print(sanitize_line_for_console(title, console), style="bold", soft_wrap=True)
    # A digest or a number is of no use in pieces; words are.
    min_widths = [
        max(map(cell_len, [*column, *head.split()]))
        if name in right_aligned_heads
        else min(width, MIN_CELL_WIDTH)
        for name, head, width, *column in zip(column_heads, heads, widths, *cells, strict=True)
    ]
    is_boxed = boxed_width <= console.width
    column_widths = widths
    if not is_boxed:
        total_width = console.width - len(COLUMN_GAP) * (len(column_heads) - 1)
        if sum(min_widths) > total_width:
            print_rows_as_lists(console, heads, cells)
            return
        # Left alone, rich folds some columns below their minimum and cuts the last one.
        column_widths = widen_columns(min_widths, widths, total_width)
    style: dict[str, Any] = (
        {} if is_boxed else {"box": None, "padding": (0, len(COLUMN_GAP), 0, 0), "pad_edge": False}
    )
    table = Table(header_style="bold", **style)
    for name, head, width in zip(column_heads, heads, column_widths, strict=True):
        justify = "right" if name in right_aligned_heads else "left"
        table.add_column(head, justify=justify, overflow="fold", width=width)  # type: ignore[arg-type]
    for row in cells:
        table.add_row(*row)
    console.print(table)


def widen_columns(min_widths: Sequence[int], max_widths: Sequence[int], total_width: int) -> list[int]:
    """Return widths of columns from minimum to maximum; room that is left goes to narrow columns first."""
    widths = list(min_widths)
    for _ in range(total_width - sum(widths)):
        narrow = [i for i, width in enumerate(widths) if width < max_widths[i]]
        if narrow:
            widths[min(narrow, key=lambda i: widths[i])] += 1
    return widths


def print_rows_as_lists(console: Console, column_heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print every row as lines of ``name: value``; the terminal wraps long lines."""
    for row in rows:
        for head, cell in zip(column_heads, row, strict=True):
            console.print(Text.assemble((f"{head}: ", "bold"), cell), soft_wrap=True)
        console.print()


def print_entry_table(
    title: str, summaries: "Sequence[Summary]", publish_outcomes: Sequence[str] = ()
) -> None:
    """Print summaries of entries, with the outcome of publishing them if there is one."""
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
        for s in summaries
    ]
    if publish_outcomes:
        columns.append("outcome")
        rows = [[*row, outcome] for row, outcome in zip(rows, publish_outcomes, strict=True)]
    print_table(title, columns, rows, right_aligned_heads={"px", "classes", "train", "held out", "top-1 %"})


def print_accuracy_table(title: str, result_rows: Sequence[dict[str, Any]]) -> None:
    """Print accuracy rows, those of all real images last."""
    rows = [
        [
            IMAGE_LABELS[row["images"]] + (f", of {row['exemplars']}" if row["exemplars"] else ""),
            row["backbone"],
            row["mode"],
            format_mean_and_std_as_percent(row, "top1"),
            format_mean_and_std_as_percent(row, "top5"),
            format_percent(row["recovered"]),
            str(row["seeds"]),
        ]
        for row in result_rows
        if row["images"] != "all real"
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
        for row in result_rows
        if row["images"] == "all real"
    ]
    columns = ["images", "backbone", "trained", "top-1 %", "top-5 %", "of full data %", "seeds"]
    print_table(title, columns, rows, right_aligned_heads={*columns[3:]})


def make_path_relative_if_below_cwd(path: str) -> str:
    """Return a path relative to the working directory if it lies below it."""
    working_directory = Path.cwd()
    if not Path(path).is_relative_to(working_directory):
        return path
    return str(Path(path).relative_to(working_directory))


def print_runs_by_backbones_table(title: str, evaluation_rows: Sequence[dict[str, Any]]) -> None:
    """Print a cross-backbone matrix: a block of rows per mode, a column per name of a backbone."""
    backbones = list(dict.fromkeys(cell["backbone"] for cell in evaluation_rows))
    modes = dict.fromkeys(cell["mode"] for cell in evaluation_rows)
    runs = dict.fromkeys((cell["run"], cell["distilled_on"]) for cell in evaluation_rows)
    cells_by_key = {(cell["mode"], cell["run"], cell["backbone"]): cell for cell in evaluation_rows}
    rows = []
    for mode in modes:
        for run, distilled_on in runs:
            row = [cells_by_key.get((mode, run, backbone)) for backbone in backbones]
            accuracies = [format_matrix_accuracy(cell) if cell else "–" for cell in row]
            rows.append([mode, distilled_on, make_path_relative_if_below_cwd(run), *accuracies])
    columns = ["trained", "distilled on", "run", *backbones]
    print_table(title, columns, rows, right_aligned_heads=set(backbones))


def format_matrix_accuracy(evaluation_row: dict[str, Any]) -> str:
    """Return the accuracy of a cell, with its mark; in parentheses if the cell says so.

    A cell that has a text `shown` shows that instead.
    """
    if "shown" in evaluation_row:
        return str(evaluation_row["shown"])
    text = format_mean_and_std_as_percent(evaluation_row, "top1") + evaluation_row.get("mark", "")
    return f"({text})" if evaluation_row.get("in_parentheses") else text


def format_mean_and_std_as_percent(accuracy_row: dict[str, Any], metric_name: str) -> str:
    """Return the mean of a metric over seeds in percent, with its deviation if there are several."""
    return format_percent(
        accuracy_row[f"{metric_name}_mean"],
        accuracy_row[f"{metric_name}_std"] if accuracy_row["seeds"] > 1 else None,
    )


def print_extraction_plan(plan: "ExtractionEstimate") -> None:
    """Print the plan of an extraction (a dry run)."""
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
    print_table(f"Plan for {plan.source}", ["what", "how much"], rows, right_aligned_heads=set())


def print_distillation_plan(plan: "DistillationEstimate") -> None:
    """Print the plan of a distillation (a dry run)."""
    decay = f", feature decay {plan.feature_decay:g}" if plan.feature_decay else ""
    rows = [
        ["images", f"{plan.images:,} of {plan.classes:,} classes, {plan.canvas} px"],
        ["objective", plan.objective + decay],
        ["steps", f"{plan.steps:,}, {plan.views} view(s) of every image in each"],
        *(
            [
                "backbone",
                f"{b.backbone} at {b.image_size} px, {b.features:,} features, weight {b.weight:g}, entry "
                f"{plan.dataset}@{b.entry_digest[:12]}, {b.mode} ({b.reason})",
            ]
            for b in plan.backbones
        ),
        *(["targets", describe_target_estimate(b.targets, b.backbone)] for b in plan.backbones if b.targets),
        ["micro-batch", f"{plan.micro_batch:,} images, graphs of {plan.graphs:,} are kept"],
        ["device", f"{plan.devices} x {plan.device}, {plan.precision}, {plan.threads} CPU thread(s) each"],
        ["checkpoint", f"{plan.checkpoint_bytes / 2**20:,.1f} MiB, two are kept until the end"],
    ]
    print_table(f"Plan for {plan.dataset}", ["what", "how much"], rows, right_aligned_heads=set())


def describe_target_estimate(targets: "TargetEstimate", backbone_spec: str) -> str:
    """Describe what the targets of a backbone allow (a dry run)."""
    ceilings, cosine = targets.ceilings, targets.cosine
    real = f"{100 * ceilings.real:.1f} %"
    if ceilings.corrected is None:
        return f"{backbone_spec}: accuracy of a head on drawn samples: {real}"
    corrected = f"{100 * ceilings.corrected:.1f} %"
    return (
        f"{backbone_spec}: accuracy of a head on drawn samples: {corrected}, on the real centres {real}; "
        f"cosine of the flows {cosine:.3f}"
    )


def format_duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
