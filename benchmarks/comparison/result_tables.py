"""Tables of the distillation benchmark."""

import statistics
from typing import Any

from comparison.training_steps import LGM, SFM_STEPS
from rich.console import Console
from rich.table import Table


def print_result_tables(result: dict[str, Any]) -> None:
    """Print a table for every section that was measured, and the bars."""
    console = Console(width=130, highlight=False)
    if result["quick"]:
        console.print("--quick: too few rounds and steps for figures that count")
    for row in result.get("time", []):
        print_step_times(console, row, result["threads"])
    if "memory" in result:
        print_peak_memory(console, result["memory"], result["growth"])
    for row in result.get("agreement", []):
        lowest, median = min(row["cosines"]), statistics.median(row["cosines"])
        console.print(
            f"  gradient, {row['what']}, {row['backbone']} in {row['precision']}, {row['image_size']} px: "
            f"cosine {median:.7f} (median of {len(row['cosines'])}, least {lowest:.7f})"
        )
    if "accuracy" in result:
        print_accuracy_comparison(console, result["accuracy"])
    print_bars(console, result["bars"])


def make_table(title: str, columns: tuple[str, ...], text_columns: tuple[str, ...]) -> Table:
    """Return an empty table whose columns are aligned right, but for those of text."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in text_columns else "right")
    return table


def format_micro_batching(row: dict[str, Any]) -> str:
    """Return micro-batch size and number of kept graphs as text."""
    return f"{row['micro_batch']} at a time, {min(row['graphs'], row['classes'])} once"


def print_step_times(console: Console, row: dict[str, Any], threads: int) -> None:
    """Print time per step and ratios of one case."""
    case = f"{row['backbone']}, {row['image_size']} px, {row['classes']} classes"
    title = f"Time per step: {case}, {threads} threads, {row['rounds']} rounds"
    table = make_table(title, ("step", "median ms", "fastest ms"), ("step",))
    for name, median in row["seconds"].items():
        label = f"{name} ({format_micro_batching(row)})" if name == SFM_STEPS[0] else name
        table.add_row(label, f"{1e3 * median:.1f}", f"{1e3 * row['fastest'][name]:.1f}")
    for name, size in row["too_large"].items():
        table.add_row(name, f"needs about {size / 2**30:.0f} GiB", "")
    console.print(table)
    for name, ratio in row["ratios"].items():
        console.print(
            f"  {name}: {ratio['median']:.3f} (quartiles {ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    if row["share_of_matrix_rate"] is not None:
        share = 100 * row["share_of_matrix_rate"]
        console.print(f"  {SFM_STEPS[0]}: {share:.0f} % of the rate of a large matrix product")


def print_peak_memory(console: Console, rows: list[dict[str, Any]], growth: list[dict[str, Any]]) -> None:
    """Print the peak memory of every step and how it grows with the number of classes."""
    columns = ("step", "backbone", "px", "classes", "micro-batches", "MiB", "idle MiB")
    table = make_table("Peak memory above the idle process", columns, columns[:2])
    for row in rows:
        peak, estimate = row.get("peak_bytes"), row.get("estimated_bytes")
        measured = f"{peak / 2**20:.0f}" if peak is not None else "out of memory"
        table.add_row(
            row["name"],
            row["backbone"],
            str(row["image_size"]),
            f"{row['classes']:,}",
            format_micro_batching(row) if row["name"] == SFM_STEPS[0] and peak is not None else "",
            f"not run: about {estimate / 2**20:.0f}" if estimate else measured,
            f"{row['idle_bytes'] / 2**20:.0f}" if peak is not None else "",
        )
    console.print(table)
    for row in growth:
        console.print(f"  1,000 / 100 classes, {row['image_size']} px: {row['ratio']:.2f}")


def print_accuracy_comparison(console: Console, accuracy: dict[str, Any]) -> None:
    """Print final accuracies, times to LGM's final accuracy, and the mean curves."""
    case = f"{accuracy['source']}, {accuracy['real_images']:,} real images, {accuracy['backbone']}"
    title = f"{case}, {accuracy['image_size']} px, 1 image per class, {accuracy['seeds']} seeds"
    columns = ("", "top-1 % at the end", "seconds in all", "seconds to LGM's final top-1")
    table = make_table(title, columns, columns[:1])
    labels = {"lgm": f"{LGM}, learning rate {accuracy['rate']:g}", "ours": SFM_STEPS[0]}
    for method, label in labels.items():
        mean, deviation = accuracy["top1"][method]
        to_target = accuracy["seconds_to_target"][method]
        table.add_row(
            label,
            f"{100 * mean:.1f} ± {100 * deviation:.1f}",
            f"{accuracy['seconds_in_all'][method]:.0f}",
            "not reached" if to_target is None else f"{to_target:.0f}",
        )
    console.print(table)
    rates = ", ".join(f"{run['rate']:g}: {100 * run['top1']:.1f}" for run in accuracy["tuning"])
    console.print(f"  LGM on the tuning split, top-1 % by learning rate: {rates}")
    for method, points in accuracy["mean_curve"].items():
        line = ", ".join(f"{point['seconds']:.0f} s {100 * point['top1']:.1f}" for point in points)
        console.print(f"  {method}, top-1 % by time: {line}")


def print_bars(console: Console, bars: list[dict[str, Any]]) -> None:
    """Print every bar and whether it is met."""
    table = make_table("Bars", ("what", "figure", "bar", ""), ("what", ""))
    for bar in bars:
        digits = 6 if 0.99 < bar["bar"] < 1 else 3
        figure = "not reached" if bar["figure"] is None else f"{bar['figure']:.{digits}f}"
        verdict = "met" if bar["met"] else "NOT MET"
        table.add_row(bar["what"], figure, f"{bar['sense']} {bar['bar']:.{digits}f}", verdict)
    console.print(table)
