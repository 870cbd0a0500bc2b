"""What a run's end shows in the terminal: the values of a table and the verdicts on its claims, in 80 columns, redirected or not.

Lines are laid out here and never cut or wrapped, so that a redirected output can be searched line by line.  What they say comes from
measured.py and report.py.
"""
from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.text import Text

from hintkd.results.measured import Group, read_groups
from hintkd.results.report import (
    COLOURS,
    MEASURED,
    PERCENT,
    SHARED,
    asked,
    claim_digits,
    deviation,
    gain_cells,
    heading,
    is_reproduced,
    judgements,
)
from hintkd.results.verdicts import overall


def summary(name: str, root: Path = Path()) -> Iterator[Text]:
    """What was measured in one folder of results/measured, line by line."""
    every = read_groups(root / MEASURED)
    groups = [group for group in every if group.name == name]
    if not groups:
        yield Text(f"{name}: nothing was measured yet")
    for group in groups:
        yield from _group(group, every)


def _group(group: Group, groups: Sequence[Group]) -> Iterator[Text]:
    yield Text(f"{heading(group)}: {group.table.metric} after the last iteration, {group.table.measure.unit}", style="bold")
    yield from map(Text, aligned(list(_values(group))))
    yield Text("best: the best of the tests on the way; s.d.: standard deviation of the nets", style="dim")
    for kind, found in judgements(group, groups).items():
        yield Text(f"\n{asked(kind, group)}:")
        for each in found:
            line = Text("  ").append(f"{each.verdict:<13}", style=COLOURS[each.verdict])
            gain, interval, n = gain_cells(each, claim_digits(each.claim, group.table))
            if interval:
                line.append(f"{gain:>7} [{interval.replace(' to ', ', ')}] n={n} ")
            because = each.reason or each.caution
            yield line.append(each.claim.text + (f": {because}" if because else ""))
    scaled = [] if group.is_full else [f"Scale {group.scale:g} is not comparable with published values, and no verdict on the paper."]
    reading = f"Beside each gain stand its {PERCENT} interval and the number of samples n."
    yield from (Text(line, style="dim") for line in ("", reading, *textwrap.wrap(SHARED, 80), *scaled, ""))


def _values(group: Group) -> Iterator[list[str]]:
    """The head, and per row, and column of a row, its value for each net (their mean over replications), mean, deviation and best test."""
    table, digits = group.table, group.table.measure.digits
    columns = list(table.columns or [""])
    published = ["paper"] * any(table.published_mean(name, column) is not None for name in table.names for column in columns)
    nets = range(1, max([table.nets, *(record.net for record in group.records)]) + 1)
    yield ["row", *["column"] * bool(table.columns), *published, *(f"net {net}" for net in nets), "mean", "s.d.", "best", ""]
    for name in table.names:
        for column in columns:
            values, best = group.values(name, column=column), overall(group.values(name, "best", column))
            found, printed, verdict = overall(values), table.published_mean(name, column), is_reproduced(group, name, column)
            if found is None:
                continue
            cells = ["" if printed is None else f"{printed:.{digits}f}" for _ in published]
            for net in nets:
                own = [value for (_, k), value in values.items() if k == net]
                cells.append("" if not own else f"{sum(own) / len(own):.2f}")
            yield [name, *[column] * bool(table.columns), *cells, f"{found.mean:.{digits}f}", deviation(found, digits),
                   "" if best is None else f"{best.mean:.{digits}f}",
                   "" if verdict is None else "reproduced" if verdict else "not reproduced"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first and the last column to the left, what is between to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(first: str, *between: str) -> str:
        *middle, last = between
        right = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        return " ".join([first.ljust(widths[0]), *right, last]).rstrip()
    return [line(*row) for row in rows]
