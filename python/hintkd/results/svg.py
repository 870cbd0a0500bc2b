"""Figures for a page: one panel each, narrow enough for a phone, in the page's own font and in colours that its style sheet decides.

What the picture means is the same as in figures.py, which draws for paper; an SVG here is a string that stands inside HTML.  Its colours
are variables such as var(--figure-kd), so that it is legible on a light and on a dark page.
"""
from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hintkd.methods.method import Line
from hintkd.results.figures import PAIR_COLOURS, band, count_iterations, smoothed
from hintkd.results.measured import Curve
from hintkd.results.pictures import Bar
from hintkd.results.verdicts import spread

WIDTH = 5.0                                                  # inches; a phone shows them at about two thirds
INK, MUTED, RULE, PAPER = "#111111", "#555555", "#dddddd", "#fefefe"

# What a colour of the drawing is called in the style sheet.
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", "#000000": "figure-black", "#777777": "figure-grey",
             "#e69f00": "figure-amber", "#0072b2": "figure-blue", "#56b4e9": "figure-sky", "#d55e00": "figure-red",
             "#cc79a7": "figure-pink", "#009e73": "figure-green", "#999933": "figure-olive"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.8, "figure.facecolor": "none",
    "axes.facecolor": "none", "legend.labelcolor": INK}


class Drawing:
    """A figure with one panel; `salt` makes its identifiers its own, so that many figures stand in one page."""

    def __init__(self, salt: str, height: float):
        self.salt = salt
        with mpl.rc_context(STYLE):
            self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
            FigureCanvasSVG(self.figure)
            self.axes: Axes = self.figure.subplots()
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.grid(color=RULE, linewidth=0.7)
        self.axes.set_axisbelow(True)

    def legend(self, columns: int, marks: Mapping[str, Artist] | None = None) -> None:
        """What each line means, or each of the given marks, below the panel."""
        handles = marks or dict(zip(*reversed(self.axes.get_legend_handles_labels()), strict=True))
        with mpl.rc_context(STYLE):
            self.figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=10,
                               handlelength=2.2, columnspacing=1.4)

    def text(self, label: str) -> str:
        """The SVG element, the same for the same drawing; `label` is for those who cannot see it."""
        buffer = io.StringIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.salt}):
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return embedded(buffer.getvalue(), label)


def embedded(svg: str, label: str) -> str:
    """An SVG file as an element of a page: no fonts, sizes, colours or names of its own."""
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _short, tag[0]), svg[svg.index("<svg"):])      # not what is written
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: f"var(--{VARIABLES[found[0]]})", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg {box[0]} role="img" aria-label="{escape(label)}">', svg, count=1)
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _short(number: re.Match[str]) -> str:
    """A coordinate to a hundredth of a point."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def dots(salt: str, label: str, rows: Sequence[Bar], lines: Mapping[str, Line], axis: str) -> str:
    """A line per row: every net, their mean with its standard deviation, and the published mean where there is one to compare."""
    drawing = Drawing(salt, 1.25 + 0.36 * len(rows))
    axes = drawing.axes
    marks = {"net": Line2D([], [], color=MUTED, marker="o", markersize=5, linestyle="")}
    for at, row in enumerate(rows):
        colour = lines[row.row].colour
        found = spread(row.values)
        if found and found.deviation is not None:
            axes.errorbar(found.mean, at, xerr=found.deviation, color=colour, linewidth=1.4, capsize=3.5, zorder=3)
            axes.scatter([found.mean], [at], marker="|", s=190, color=colour, linewidth=2.2, zorder=4)
            marks["mean, standard deviation"] = Line2D([], [], color=MUTED, marker="|", markersize=11, markeredgewidth=2)
        axes.scatter(row.values, [at] * len(row.values), s=26, color=colour, edgecolor=PAPER, linewidth=0.7, zorder=5)
        published = [] if row.published is None else [row.published]
        for values, marker, name in ((published, "D", "published mean"), (row.ensembles, "^", "nets together")):
            if values:
                axes.scatter(values, [at] * len(values), s=40, marker=marker, facecolor=PAPER, edgecolor=INK, linewidth=1.2, zorder=6)
                marks[name] = Line2D([], [], color=INK, marker=marker, markersize=6, markerfacecolor=PAPER, linestyle="")
    axes.set_yticks(range(len(rows)), [row.row for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    drawing.legend(2, marks)
    return drawing.text(label)


def curves(salt: str, label: str, rows: Mapping[str, Sequence[Curve]], lines: Mapping[str, Line], axis: str,
           window: tuple[float, float] | None = None, smooth: bool = False) -> str:
    """Per row the mean over its nets and their range, of the last stage; `smooth` shows the running median of a training loss."""
    drawing = Drawing(salt, 3.6)
    axes, ends = drawing.axes, list[float]()
    for name, found in rows.items():
        ends += band(axes, name, lines[name], [smoothed(curve) for curve in found] if smooth else found, window)
    if ends:
        margin = 0.06 * (max(ends) - min(ends) or 1)
        axes.set_ylim(min(ends) - margin, max(ends) + margin)
    if window:
        axes.set_xlim(*window)
    axes.set(xlabel="iteration of the last stage", ylabel=axis)
    count_iterations(axes)
    drawing.legend(3)
    return drawing.text(label)


def hint_losses(salt: str, label: str, losses: Mapping[str, Mapping[str, Curve]], lines: Mapping[str, Line]) -> str:
    """Stage 1: per row and pair the hint loss, those of a pair divided by one number; a colour per pair, a line style per row."""
    drawing = Drawing(salt, 3.9)
    for method, pairs in losses.items():
        for pair, curve in sorted(pairs.items()):
            drawing.axes.plot(*zip(*curve, strict=True), color=PAIR_COLOURS.get(pair, "#777777"), linestyle=lines[method].hints,
                              linewidth=1.5, label=f"{method}, pair {pair}" if pair else method)
    drawing.axes.set(xlabel="iteration of Stage 1", ylabel="hint loss", ylim=(0, None))
    count_iterations(drawing.axes)
    drawing.legend(2)
    return drawing.text(label)
