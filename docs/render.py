#!/usr/bin/env python3
"""Writes what the documents show of the code and of results/: the blocks between marks, and the picture of the stages.

    python docs/render.py            from the repository's root, as `make docs` does

A test compares the blocks with what this program would write, so none of them is typed by hand.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from hintkd.methods.method import stages_of, teacher_stages
from hintkd.methods.papers import PAPERS, paper
from hintkd.results.measured import Group, read_groups
from hintkd.results.verdicts import Spread, overall
from hintkd.study.table import find_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def methods_block() -> str:
    """Every paper's methods with their docstrings, under the first paper that has them."""
    first: dict[tuple[str, str], str] = {}
    for named in PAPERS:
        for name, method in paper(named).methods.items():
            if not method.is_shared:
                first.setdefault((name, method.about), named)
    found = [[f"`{named}`", f"`{name}`", about] for (name, about), named in first.items()]
    return table(["paper", "method", "what it does"], *found)


def results_block(measured: Path = ROOT / "results/measured") -> str:
    """Published beside measured means, for every table that was measured."""
    rows = [row for group in read_groups(measured) for row in _rows(group)]
    if not rows:
        return "Nothing was measured yet.\n"
    return table(["table", "method", "published", "measured here", "difference", "nets", "schedule"], *rows)


def _rows(group: Group) -> Iterator[list[str]]:
    shown = group.table
    for name in shown.names:
        found = overall(group.values(name))
        if found is None:
            continue
        published = shown.published_mean(name)
        printed = "" if published is None else f"{published:.2f}"
        difference = "" if published is None or not group.is_full else f"{found.mean - published:+.2f}"
        schedule = "in full" if group.is_full else f"shortened to {group.scale:g}: not comparable"
        numeric = f", measured by numeric {group.old_numeric}" if group.old_numeric else ""
        yield [shown.title, name, printed, _text(found), difference, str(len(group.of(name))), schedule + numeric]


def _text(found: Spread) -> str:
    return f"{found.mean:.2f}" + ("" if found.deviation is None else f" ± {found.deviation:.2f}")


def table(*rows: list[str]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table."""
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return "".join(map(line, (rows[0], ["---"] * len(rows[0]), *rows[1:])))


def durations_block(path: Path = ROOT / "benchmarks/durations.json") -> str:
    """How long the two commands of the first lines take, as benchmarks/durations.py measured it."""
    if not path.exists():
        return "How long they take was not measured yet.\n"
    found = json.loads(path.read_text())
    where = f"With {found['cores']} cores of {' '.join(found['cpu'].split())}"
    return f"{where}, `make demo` takes {_minutes(found['demo_s'])} and `make test` {_minutes(found['test_s'])}, once `.venv` is there.\n"


def _minutes(seconds: float) -> str:
    count = max(1, round(seconds / 60))
    return f"{count} minute{'s' * (count != 1)}"


BLOCKS = {"methods": methods_block, "results": results_block, "durations": durations_block}


def filled(page: str) -> str:
    """The page with what stands between `<!-- NAME -->` and `<!-- end -->` written anew."""
    return re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{BLOCKS[found[2]]()}{found[3]}", page, flags=re.DOTALL)


def main() -> None:
    from hintkd.results.figures import draw_stages

    README.write_text(filled(README.read_text()))
    x = find_table("table1").experiment("layerwise-hint")
    draw_stages(ROOT / "docs/stages.png", [*teacher_stages(x), *stages_of(x)], "Layer-wise hint training, stage by stage")


if __name__ == "__main__":
    main()
