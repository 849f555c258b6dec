"""Draw charts as inline SVG with the colours and the font of the page."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfm.eval.report.reported_runs import LossPoint
from sfm.text import escape_non_utf8

BarKind = Literal["distilled", "few real", "all real", "no images"]

# matplotlib knows no CSS: it draws placeholder colours, which become the page's.
TEXT_COLOUR, GRID_COLOUR = "#010101", "#010102"
FILL_COLOURS: dict[BarKind, str] = {
    "distilled": "#010103",
    "few real": "#010104",
    "all real": "#010105",
    "no images": "#010106",
}
PAGE_COLOURS = {
    TEXT_COLOUR: "currentColor",
    GRID_COLOUR: "var(--faint)",
    FILL_COLOURS["distilled"]: "var(--distilled)",
    FILL_COLOURS["few real"]: "var(--few-real)",
    FILL_COLOURS["all real"]: "var(--all-real)",
    FILL_COLOURS["no images"]: "var(--no-images)",
}
HATCHES: dict[BarKind, str] = {"distilled": "", "few real": "///", "all real": "|||", "no images": "xx"}

CHART_STYLE: Any = {
    "svg.fonttype": "none",
    # The widest of common fonts: the font of the page takes no more room.
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": TEXT_COLOUR,
    "axes.edgecolor": TEXT_COLOUR,
    "axes.labelcolor": TEXT_COLOUR,
    "xtick.color": TEXT_COLOUR,
    "ytick.color": TEXT_COLOUR,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
CHART_INCHES = 5.6
"""Inches: wide enough for a column of a page, narrow enough that its text is still read on a phone."""

MAX_POINTS = 300


@dataclass(frozen=True)
class AccuracyBar:
    """One bar of a chart.

    Attributes
    ----------
    label : str
    percent, std_percent : float
        In percent; the deviation is None for a single seed.
    kind : str
        Images the classifier was trained on; determines colour and hatch.
    """

    label: str
    percent: float
    std_percent: float | None
    kind: BarKind


def draw_bar_chart(titled_bar_groups: Sequence[tuple[str, Sequence[AccuracyBar]]], alt_text: str) -> Markup:
    """Draw accuracies as horizontal bars with error bars, and the value beside each.

    Parameters
    ----------
    titled_bar_groups : sequence of (str, sequence of Bar)
        One group per backbone, under its name.
    alt_text : str
        Alternative text.
    """
    with mpl.rc_context(CHART_STYLE):
        rows = sum(1 + len(bars) for _, bars in titled_bar_groups)
        figure = Figure((CHART_INCHES, 0.55 + 0.27 * rows), layout="constrained")
        axes = figure.subplots()
        labels: list[tuple[float, str, str]] = []
        y = 0.0
        for title, bars in titled_bar_groups:
            labels.append((y, title, "bold"))
            for bar in bars:
                y += 1
                draw_bar(axes, y, bar)
                labels.append((y, bar.label, "normal"))
            y += 1.2
        axes.set(xlim=(0, 118), ylim=(y - 0.5, -0.8), xticks=range(0, 101, 20), xlabel="top-1 accuracy, %")
        axes.set_yticks([place for place, _, _ in labels], [text for _, text, _ in labels])
        for tick, (_, _, weight) in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set_fontweight(weight)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_bounds(0, 100)
        axes.grid(axis="x", color=GRID_COLOUR, linewidth=0.7)
        axes.set_axisbelow(True)
        return render_svg(figure, alt_text)


def draw_bar(axes: Axes, y: float, bar: AccuracyBar) -> None:
    """Draw one bar, its error bar and its value."""
    colour = FILL_COLOURS[bar.kind]
    hatch = HATCHES[bar.kind]
    style: Any = {"facecolor": "none", "edgecolor": colour, "hatch": hatch} if hatch else {"color": colour}
    axes.barh(y, bar.percent, height=0.72, linewidth=1, **style)
    end = bar.percent
    if bar.std_percent is not None:
        end += bar.std_percent
        axes.errorbar(bar.percent, y, xerr=bar.std_percent, color=TEXT_COLOUR, capsize=3, linewidth=1.2)
    axes.text(end + 1.5, y, f"{bar.percent:.1f}", va="center", ha="left", fontsize=9)


def draw_loss_chart(
    loss_history: Sequence[LossPoint], loss_axis_limits: tuple[float, float], alt_text: str
) -> Markup:
    """Draw the loss over the steps, with the resolution of the pyramid.

    Many steps are drawn as their mean, in a band from minimum to maximum.

    Parameters
    ----------
    loss_history : sequence of LossPoint
        At least one.
    loss_axis_limits : (float, float)
        Limits of the loss axis, the same for all runs of a report.
    alt_text : str
    """
    steps = np.array([row.step for row in loss_history])
    loss = np.array([row.loss for row in loss_history])
    resolution = np.array([row.resolution for row in loss_history])
    chunks = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    middle = [steps[chunk].mean() for chunk in chunks]
    with mpl.rc_context(CHART_STYLE):
        figure = Figure((CHART_INCHES, 2.9), layout="constrained")
        axes = figure.subplots()
        changes = [0, *(np.flatnonzero(np.diff(resolution)) + 1), len(steps)]
        for number, (begin, end) in enumerate(itertools.pairwise(changes)):
            if number % 2 == 0:
                axes.axvspan(steps[begin] - 1, steps[end - 1], color=GRID_COLOUR, alpha=0.45, linewidth=0)
        axes.fill_between(
            middle,
            [loss[chunk].min() for chunk in chunks],
            [loss[chunk].max() for chunk in chunks],
            color=FILL_COLOURS["distilled"],
            alpha=0.3,
            linewidth=0,
        )
        axes.plot(
            middle, [loss[chunk].mean() for chunk in chunks], color=FILL_COLOURS["distilled"], linewidth=1.6
        )
        axes.set(xlim=(0, steps[-1]), ylim=loss_axis_limits, xlabel="step", ylabel="loss")
        above = axes.secondary_xaxis("top")
        centres = [(steps[b] - 1 + steps[e - 1]) / 2 for b, e in itertools.pairwise(changes)]
        above.set_xticks(centres, [str(resolution[begin]) for begin in changes[:-1]], fontsize=8)
        above.tick_params(length=0)
        above.set_xlabel("finest level of the pyramid, pixels", fontsize=9)
        return render_svg(figure, alt_text)


def render_svg(figure: Figure, alt_text: str) -> Markup:
    """Return a figure as an ``<svg>`` element for a page."""
    buffer = StringIO()
    with mpl.rc_context({"svg.hashsalt": escape_non_utf8(alt_text)}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    # Every chart has the same group ids, and an id must be unique in a page.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    # CSS variables work in a style, not in an attribute.
    svg = re.sub(r'\bfill="(#[0-9a-f]{6})"', r'style="fill: \1"', svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for placeholder, colour in PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = re.sub(r'\s+width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r"\n\s*", " ", svg)
    label = escape(alt_text)
    return Markup(svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{label}"', 1))
