"""What there is to draw of a group of records, as plain numbers; figures.py draws it for paper, svg.py for a page."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hintkd.methods.method import Line
from hintkd.nets.stages import KD_LOSS
from hintkd.results.measured import Curve, Group
from hintkd.results.verdicts import overall

TEST_LOSS = "test loss, equation 2"
# Okabe and Ito's colours, which colour-blind people can tell apart: for rows whose method does not say how it is drawn, or says the same.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
SPARE = tuple(Line(colour, style) for style in ("-", "--", "-.", ":") for colour in COLOURS)


@dataclass(frozen=True)
class Bar:
    """One row's results: per net, the published mean where there is one to be compared, per replication all nets together."""
    row: str
    values: Sequence[float]
    published: float | None = None
    ensembles: Sequence[float] = ()


@dataclass(frozen=True)
class Pictures:
    """What a table asks for and its records have; empty where it does not ask.  Curves by row, one per net, of the last stage.

    lines         how each row is drawn
    bars          a row each, the teacher's too; teacher: its mean
    metric        on the test set
    loss          of the rows that are trained under equation 2, if some are; loss_label names one on the test set, None: of training
    window        the iterations to show, None for all
    hints         by row and pair, of Stage 1 of its first net
    """
    lines: dict[str, Line]
    bars: list[Bar]
    teacher: float | None
    metric: dict[str, list[Curve]]
    loss: dict[str, list[Curve]]
    loss_label: str | None
    window: tuple[float, float] | None
    hints: dict[str, dict[str, Curve]]


def pictures(group: Group) -> Pictures:
    """Of one group of records."""
    table, value = group.table, group.table.measure.value
    names = [name for name in table.names if group.values(name)]
    students = [name for name in names if not table.is_shared(name)]
    teacher = [mean.mean for name in names if table.is_shared(name) and (mean := overall(group.values(name)))]
    softened = [name for name in students if any(KD_LOSS in record.stages[-1].train for record in group.of(name))]
    stages = {name: [record.stages[-1] for record in group.of(name)] for name in softened or students}
    curves = "curves" in table.draw
    return Pictures(
        lines=lines({name: method.line if (method := table.method(name)) else None for name in names}),
        bars=[Bar(name, list(group.values(name).values()), table.published_mean(name) if group.is_full else None,
                  [value(number) for number in group.ensembles.get(name, {}).values()])
              for name in names if "bars" in table.draw and students],
        teacher=teacher[0] if teacher else None,
        metric={name: [[(at, value(number)) for at, number in record.stages[-1].test.get(table.output, [])]
                       for record in group.of(name)] for name in students if curves},
        loss={name: [stage.test.get(KD_LOSS, []) if table.test_loss else stage.loss for stage in each]
              for name, each in stages.items() if curves},
        loss_label=TEST_LOSS if table.test_loss else None,
        window=None if table.window is None else (table.window[0] * group.scale, table.window[1] * group.scale),
        hints={name: losses for name in students if "hint-losses" in table.draw and (losses := group.hint_losses(group.of(name)[0]))})


def lines(wanted: Mapping[str, Line | None]) -> dict[str, Line]:
    """How each row is drawn: as its method says, unless another row is drawn so already or it does not say."""
    found: dict[str, Line] = {}
    said = {(line.colour, line.style) for line in wanted.values() if line}
    for name, line in wanted.items():
        taken = {(each.colour, each.style) for each in found.values()}
        spare = next((each for each in SPARE if (each.colour, each.style) not in taken | said), SPARE[0])
        if line and (line.colour, line.style) not in taken:
            found[name] = line
        else:
            found[name] = spare._replace(hints=line.hints) if line else spare
    return found
