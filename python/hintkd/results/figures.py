"""Pictures: curves, hint losses and bars in the manner of the paper's figures, and the stages of a method as boxes.

Everything is drawn from plain numbers or from the stages' nets; which numbers belong together is the report's business.  matplotlib
is imported with this module, so import it only when there is something to draw.
"""
from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator

from hintkd.backend import caffe_pb2
from hintkd.files import written
from hintkd.methods.method import Line
from hintkd.methods.stage import Stage
from hintkd.results.measured import Curve
from hintkd.results.pictures import Bar

PAIR_COLOURS = {"1": "#0072B2", "2": "#E69F00", "3": "#009E73"}
EARLY = 0.6                                                  # the part of a run that does not set its axis: the ends are to be told apart
SMOOTH = 5                                                   # displays of which a training loss shows the median


def draw_curves(path: Path, title: str, accuracy: Mapping[str, Sequence[Curve]], loss: Mapping[str, Sequence[Curve]],
                lines: Mapping[str, Line], label: str = "test accuracy (%)", loss_label: str | None = None,
                window: tuple[float, float] | None = None) -> None:
    """Stage 2 as in figure 4: on the left the test set, on the right a loss; per row the mean over its nets and their range.

    accuracy, loss    row -> one curve of (iteration, value) per net
    lines             how each is drawn
    loss_label        of a loss on the test set; None: it is that of training, which is smoothed
    window            the iterations to show, None for all
    """
    figure, (left, right) = _figure(12, 4.9, 2)
    if loss_label is None:
        loss_label = f"training loss, running median of {SMOOTH}"
        loss = {method: [smoothed(curve) for curve in curves] for method, curves in loss.items()}
    for axes, methods, text in ((left, accuracy, label), (right, loss, loss_label)):
        ends: list[float] = []
        for name, curves in methods.items():
            ends += band(axes, name, lines[name], curves, window)
        axes.set(xlabel="iteration of Stage 2", ylabel=text)
        count_iterations(axes)
        if ends:
            margin = 0.06 * (max(ends) - min(ends) or 1)
            axes.set_ylim(min(ends) - margin, max(ends) + margin)
        if window:
            axes.set_xlim(*window)
    handles = {name: handle for axes in (right, left) for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in dict.fromkeys([*accuracy, *loss]) if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside right center", frameon=False)
    elsewhere = [name for name in accuracy if name not in loss]
    alone = f"; on the left alone, because trained under another loss: {', '.join(elsewhere)}" if elsewhere else ""
    figure.supxlabel(f"lines: mean of a method's nets; bands: from the lowest to the highest of them{alone}", fontsize=9)
    _save(figure, path, title)


def draw_hint_losses(path: Path, title: str, losses: Mapping[str, Mapping[str, Curve]], lines: Mapping[str, Line],
                     axis: tuple[float, float] | None = None) -> None:
    """Stage 1 as in figure 9: a line style for each row, a colour for each pair.

    losses    row -> pair ("1", "2", "3", or "" for the only one) -> curve, those of a pair divided by one number for all methods
    axis      range of the printed figure, marked at the edge
    """
    figure, (axes,) = _figure(8.6, 4.6)
    for method, pairs in losses.items():
        for pair, curve in sorted(pairs.items()):
            colour = PAIR_COLOURS.get(pair, "#777777")
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=lines[method].hints, linewidth=1.6,
                      label=f"{method}, pair {pair}" if pair else method)
    axes.set(xlabel="iteration of Stage 1", ylabel="hint loss / largest first value at its layer", ylim=(0, None))
    count_iterations(axes)
    if axis:
        axes.axhspan(*axis, color="#000000", alpha=0.05, linewidth=0, label="range of the printed figure")
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path, title)


def draw_bars(path: Path, title: str, bars: Sequence[Bar], lines: Mapping[str, Line], label: str = "test accuracy (%)",
              teacher: float | None = None, axis: tuple[float, float] | None = None) -> None:
    """Means as bars as in figures 5, 7, 8 and 10, with every net as a dot, the standard deviation, and published means as diamonds.

    lines      how each bar is drawn; teacher    drawn as a line; axis: the printed range, which is shown at least
    """
    figure, (axes,) = _figure(max(6.0, 1.6 + 1.2 * len(bars)), 4.8)
    seen: list[float] = list(axis or ()) + ([] if teacher is None else [teacher])
    for index, bar in enumerate(bars):
        mean = sum(bar.values) / len(bar.values)
        deviation = (sum((v - mean) ** 2 for v in bar.values) / (len(bar.values) - 1)) ** 0.5 if len(bar.values) > 1 else 0.0
        line = lines[bar.row]
        hatch = "//" if line.style == "--" else None
        axes.bar(index, mean, width=0.62, color=line.colour, alpha=0.75, hatch=hatch, edgecolor="white", zorder=2)
        axes.errorbar(index, mean, yerr=deviation, color="#222222", capsize=5, linewidth=1.2, zorder=4, label="standard deviation")
        offsets = [0.0] if len(bar.values) == 1 else [0.3 * (k / (len(bar.values) - 1) - 0.5) for k in range(len(bar.values))]
        axes.scatter([index + offset for offset in offsets], bar.values, s=26, color="#222222", edgecolor="white", zorder=5, label="net")
        seen += [*bar.values, mean - deviation, mean + deviation]
        published = [] if bar.published is None else [bar.published]
        for marked, marker, name in ((published, "D", "published"), (bar.ensembles, "^", "ensemble of the nets")):
            if marked:
                axes.scatter([index + 0.4] * len(marked), marked, s=46, marker=marker, facecolor="white", edgecolor="#222222", zorder=6,
                             label=name)
                seen += marked
        axes.annotate(f"{mean:.2f}", (index, max(*bar.values, mean + deviation)), xytext=(0, 5), textcoords="offset points", ha="center",
                      zorder=6)
    if teacher is not None:
        axes.axhline(teacher, color="#777777", linestyle="--", linewidth=1.4, label="teacher", zorder=3)
    low, high = min(seen), max(seen)
    margin = 0.12 * (high - low or 1)
    axes.set_ylim(max(0, low - margin), high + 1.3 * margin)
    axes.set_ylabel(label + ("" if axes.get_ylim()[0] == 0 else ", axis cut"))
    axes.set_xticks(range(len(bars)), [textwrap.fill(bar.row, 11) for bar in bars])
    axes.grid(axis="x", visible=False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center",
                  ncols=min(4, int(figure.get_figwidth() // 2)), frameon=False)
    _save(figure, path, title)


def band(axes: Axes, name: str, line: Line, curves: Sequence[Curve], window: tuple[float, float] | None) -> list[float]:
    """Draw the mean of some curves and their range; the values that should set the range of the axis."""
    by_iteration: dict[int, list[float]] = {}
    for curve in curves:
        for iteration, value in curve:
            by_iteration.setdefault(iteration, []).append(value)
    begin, end = window or (0, math.inf)
    shown = {at: values for at, values in sorted(by_iteration.items()) if len(values) == len(curves) and begin <= at <= end}
    if not shown:
        return []
    iterations = list(shown)
    means = [sum(values) / len(values) for values in shown.values()]
    axes.plot(iterations, means, color=line.colour, linestyle=line.style, linewidth=1.7, label=name)
    axes.fill_between(iterations, [min(v) for v in shown.values()], [max(v) for v in shown.values()], color=line.colour, alpha=0.12,
                      linewidth=0)
    late = EARLY * iterations[-1] if not window else 0
    return [value for iteration, values in shown.items() if iteration >= late for value in values]


def smoothed(curve: Curve) -> Curve:
    """The running median of a curve: Caffe's average begins anew with each call of step, so that some displays show a single batch."""
    half = SMOOTH // 2
    return [(curve[at][0], median(value for _, value in curve[at - half:at + half + 1])) for at in range(half, len(curve) - half)]


# -------------------------------------------------------------------------------------------------------------------- stages

TRAINED, FROZEN, ABSENT = "#D55E00", "#9DB7C9", "#F2F2F2"
PREFIX = "teacher/"
PARTS = ("Convolution", "InnerProduct", "BatchNorm", "Scale", "ReLU", "Eltwise", "PReLU", "Concat", "Deconvolution")
WEIGHTED = ("Convolution", "InnerProduct", "Scale", "Deconvolution")
BOXES_ACROSS = 6                                             # boxes side by side in a row of panels
LOSSES = ("SoftmaxWithLoss", "EuclideanLoss", "SigmoidCrossEntropyLoss")


@dataclass
class Part:
    """The layers of one part of a network in a stage: first_conv, group0 ... fc, by the beginning of their names."""
    name: str
    layers: list[Any]                                        # LayerParameters
    begun: str                                               # where its weights come from: "goes on learning", "new, random" or both

    @property
    def is_trained(self) -> bool:
        """Some parameter of it learns."""
        return any(not layer.param or any(spec.lr_mult for spec in layer.param) for layer in self.layers if layer.type in WEIGHTED)

    @property
    def label(self) -> str:
        blocks = {found[1] for layer in self.layers if (found := re.search(r"_block(\d+)_", layer.name))}
        widths = [layer.convolution_param.num_output for layer in self.layers if layer.type == "Convolution"]
        about = [f"{len(blocks)} module{'s' * (len(blocks) > 1)}"] * bool(blocks) + [f"{max(widths)} wide" for _ in widths[:1]]
        return "\n".join([self.name, ", ".join(about)] if about else [self.name])


Column = dict[str, Part]                                     # the parts of one network, from input to output


def draw_stages(path: Path, stages: Sequence[Stage], title: str) -> None:
    """Which part of teacher and student each stage trains, and where its losses act, read from the stages' nets.

    One panel per stage, in the order given; of each network the groups of layers, from the images at the bottom to the classes on top.
    What every stage leaves behind, a regressor, is named beside its loss.
    """
    teachers = {weights.source for stage in stages for weights in stage.weights_in if weights.prefix == PREFIX}
    kept = {layer.name for stage in stages for layer in stage.net.layer if stage.keeps(layer.name) or layer.name.startswith(PREFIX)}
    columns = [_columns(stage, stage in teachers, kept) for stage in stages]
    outlines = {role: _outline([each[role] for each in columns if role in each]) for role in ("teacher", "student")}
    outlines = {role: outline for role, outline in outlines.items() if outline}
    across = min(len(stages), BOXES_ACROSS // len(outlines))
    down = -(-len(stages) // across)
    figure, panels = _figure(1.8 * len(outlines) * across, 0.9 + 4.2 * down, across * down, rows=down)
    for axes in panels:
        axes.set_axis_off()
    for stage, axes, column in zip(stages, panels, columns, strict=False):
        _panel(axes, stage, column, outlines)
    keys = [Patch(facecolor=TRAINED, label="trained in this stage"), Patch(facecolor=FROZEN, label="frozen"),
            Patch(facecolor=ABSENT, edgecolor="#BBBBBB", linestyle=":", label="not in this stage's net")]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path, title)


def _columns(stage: Stage, is_teacher: bool, kept: set[str]) -> dict[str, Column]:
    """Per network of a stage ("teacher", "student") its parts; `kept` are the layers that some stage keeps."""
    known = {weights.prefix + layer.name for weights in stage.weights_in if not isinstance(weights.source, Path)
             for layer in weights.source.net.layer if weights.source.keeps(layer.name)}
    columns: dict[str, Column] = {}
    for layer in stage.net.layer:
        name = _part_name(layer)
        if name and layer.name in kept:
            role = "teacher" if is_teacher or layer.name.startswith(PREFIX) else "student"
            columns.setdefault(role, {}).setdefault(name, Part(name, [], "")).layers.append(layer)
    for column in columns.values():
        for part in column.values():
            found = {layer.name in known for layer in part.layers if layer.type in WEIGHTED}
            part.begun = "goes on learning" if found == {True} else "new, random" if found == {False} else "in part new"
    return columns


def _part_name(layer: Any) -> str | None:
    """The part that a layer belongs to; None for data, losses, measurements and pooling."""
    return re.split(r"_(?:block|conv\d|bn|scale|relu)", layer.name.removeprefix(PREFIX))[0] if layer.type in PARTS else None


def _outline(columns: Sequence[Column]) -> dict[str, str]:
    """The labels of all parts that a network has in some stage, in the order of its fullest net and as they are there."""
    labels: dict[str, str] = {}
    for column in sorted(columns, key=lambda column: -sum(len(part.layers) for part in column.values())):
        for name, part in column.items():
            labels.setdefault(name, part.label)
    return labels


def _panel(axes: Axes, stage: Stage, columns: Mapping[str, Column], outlines: Mapping[str, Mapping[str, str]]) -> None:
    """One stage: a column of boxes per network, and its losses."""
    axes.set(xlim=(-0.6, 1.18 * len(outlines) - 0.58), ylim=(-1.0, max(map(len, outlines.values())) - 0.15))
    axes.set_title(f"{stage.title}\n{stage.solver.max_iter:,} iterations", fontsize=10)
    places: dict[str, tuple[float, float]] = {}
    for number, (role, outline) in enumerate(outlines.items()):
        x = 1.18 * number
        axes.text(x, -0.62, role, ha="center", va="top", fontsize=10, color="#222222" if role in columns else "#AAAAAA")
        below = None
        for level, (name, label) in enumerate(outline.items()):
            part = columns.get(role, {}).get(name)
            _box(axes, x, level, part, label, bool(stage.weights_in))
            if part and below is not None:
                axes.annotate("", (x, level - 0.36), (x, below + 0.36), zorder=0,
                              arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1, "shrinkA": 0, "shrinkB": 0})
            below = level if part else below
            places[f"{role}/{name}"] = x, level
    for text, ends in _losses(stage, columns):
        _mark_loss(axes, text, [places[end] for end in ends])


def _box(axes: Axes, x: float, level: int, part: Part | None, label: str, starts_from_weights: bool) -> None:
    """One part of a network; `label` is what it is called where it is not in the net."""
    trained = part is not None and part.is_trained
    axes.add_patch(FancyBboxPatch((x - 0.4, level - 0.34), 0.8, 0.68, boxstyle="round,pad=0.02,rounding_size=0.06",
                                  facecolor=ABSENT if part is None else TRAINED if trained else FROZEN,
                                  edgecolor="#BBBBBB" if part is None else "#444444", linestyle=":" if part is None else "-"))
    text = part.label + (f"\n{part.begun}" if trained and starts_from_weights else "") if part else label
    axes.text(x, level, text, ha="center", va="center", fontsize=8.6, linespacing=1.1,
              color="#AAAAAA" if part is None else "white" if trained else "#222222")


def _losses(stage: Stage, columns: Mapping[str, Column]) -> list[tuple[str, list[str]]]:
    """Per loss of the TRAIN phase what to call it, and the parts whose outputs it compares, as "student/group2", by its bottoms."""
    makers: dict[str, str] = {}                              # blob -> the part that made it
    through: dict[str, str] = {}                             # blob -> the layer outside all parts that made it: a regressor
    losses = []
    for layer in stage.net.layer:
        if layer.include and all(rule.phase == caffe_pb2.TEST for rule in layer.include):
            continue
        if layer.type in LOSSES or (layer.type == "Python" and any(layer.loss_weight)):
            via = "".join(f"\nthrough {through[bottom]}" for bottom in layer.bottom if bottom in through)
            losses.append((layer.name.replace("_", " ") + via, list(dict.fromkeys(makers[b] for b in layer.bottom if b in makers))))
            continue
        name = _part_name(layer)
        role = "teacher" if layer.name.startswith(PREFIX) or "student" not in columns else "student"
        below = next((makers[bottom] for bottom in layer.bottom if bottom in makers), None)
        for top in layer.top:
            if name in columns.get(role, {}):
                makers[top] = f"{role}/{name}"
            elif below:
                makers[top] = below
                if name:
                    through[top] = layer.name
    return losses


def _mark_loss(axes: Axes, text: str, ends: Sequence[tuple[float, float]]) -> None:
    """A loss as an arrow that joins what it compares, or above the one part that it trains."""
    (x, y), (other_x, other_y) = ends[0], ends[-1]
    if len(ends) > 1:
        axes.add_patch(FancyArrowPatch((other_x + 0.42, other_y), (x - 0.42, y), arrowstyle="-|>", mutation_scale=13, color="black",
                                       linewidth=1.6))
    axes.text((x + other_x) / 2, max(y, other_y) + 0.4, text, ha="center", va="bottom", fontsize=9, linespacing=1.1)


# ------------------------------------------------------------------------------------------------------------------- matplotlib

def _figure(width: float, height: float, panels: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches with its panels, row by row, in one plain style."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, panels // rows, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="#DDDDDD", linewidth=0.7)
        each.set_axisbelow(True)
    return figure, axes


def count_iterations(axes: Axes) -> None:
    """Few and readable numbers on the axis of iterations."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _save(figure: Figure, path: Path, title: str) -> None:
    """Write a PNG that appears whole or not at all, the same bytes for the same picture."""
    figure.suptitle(textwrap.fill(title, round(11 * figure.get_figwidth())), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        part.write_bytes(buffer.getvalue())
