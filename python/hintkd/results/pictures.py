"""What there is to draw of a group of records, as plain numbers; figures.py draws it for paper, svg.py for a page."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hintkd.nets.stages import KD_LOSS
from hintkd.results.measured import Curve, Group
from hintkd.results.verdicts import percent
from hintkd.study.table import TEACHER

TEST_LOSS = "test loss, equation 2"


@dataclass(frozen=True)
class Bar:
    """One method's results: per net, the published mean where there is one to be compared, per replication all nets together; percent."""
    method: str
    values: Sequence[float]
    published: float | None = None
    ensembles: Sequence[float] = ()


@dataclass(frozen=True)
class Pictures:
    """What a table asks for and its records have; empty where it does not ask.  Curves by method, one per net, of the last stage.

    bars          a row each, the teacher's too
    metric        on the test set, percent
    loss          of the methods that are trained under equation 2, if some are; loss_label names one on the test set, None: of training
    window        the iterations to show, None for all
    hints         by method and pair, of Stage 1 of its first net
    """
    bars: list[Bar]
    metric: dict[str, list[Curve]]
    loss: dict[str, list[Curve]]
    loss_label: str | None
    window: tuple[float, float] | None
    hints: dict[str, dict[str, Curve]]


def pictures(group: Group) -> Pictures:
    """Of one group of records."""
    table = group.table
    methods = [method for method in table.methods if group.of(method)]
    students = [method for method in methods if method != TEACHER]
    softened = [method for method in students if any(KD_LOSS in record.stages[-1].train for record in group.of(method))]
    stages = {method: [record.stages[-1] for record in group.of(method)] for method in softened or students}
    curves = "curves" in table.draw
    return Pictures(
        bars=[Bar(method, list(group.values(method).values()), table.row(method).published_mean if group.is_full else None,
                  [percent(value, table.metric) for value in group.ensembles.get(method, {}).values()])
              for method in methods if "bars" in table.draw and students],
        metric={method: [[(at, percent(value, table.metric)) for at, value in record.stages[-1].test.get(record.metric, [])]
                         for record in group.of(method)] for method in students if curves},
        loss={method: [stage.test.get(KD_LOSS, []) if table.test_loss else stage.loss for stage in each]
              for method, each in stages.items() if curves},
        loss_label=TEST_LOSS if table.test_loss else None,
        window=None if table.window is None else (table.window[0] * group.scale, table.window[1] * group.scale),
        hints={method: losses for method in students if "hint-losses" in table.draw and (losses := group.hint_losses(group.of(method)[0]))})
