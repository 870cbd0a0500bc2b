"""What was measured as plain data for other programs: JSON of all of it, and a CSV file for each table with a line for each net."""
from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hintkd.files import write_file
from hintkd.results.measured import Group, Judgement, Record
from hintkd.results.verdicts import overall

FOLDER = Path("results/csv")
COLUMNS = ("table", "row", "method", "column", "replication", "net", "metric", "last", "best", "published", "scale", "seed", "iterations",
           "seconds", "device", "precision", "engine")


def as_data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every group as JSON has it: its conditions, the values of every row in the table's metric, its claims with verdicts."""
    return [{"name": group.name, "table": group.table.name, "title": group.table.title, "metric": group.table.metric,
             "conditions": group.conditions, "rows": [_row(group, name, column) for name in group.table.names
                                                      for column in group.table.columns or [""] if group.values(name, column=column)],
             "claims": [_claim(group.judge(claim, groups), kind) for kind in ("claims", "orders", "controls")
                        for claim in getattr(group.table, kind)]} for group in groups]


def _row(group: Group, name: str, column: str) -> dict[str, Any]:
    found, records = overall(group.values(name, column=column)), group.of(name)
    return {"row": name, "method": records[0].method, **({"column": column} if column else {}),
            "published": group.table.published_mean(name, column), "mean": found and found.mean, "deviation": found and found.deviation,
            "nets": [_net(group, record, column) for record in records]}


def _net(group: Group, record: Record, column: str) -> dict[str, Any]:
    return {"replication": record.repeat, "net": record.net, "last": group.value(record, column=column),
            "best": group.value(record, "best", column), "iterations": list(record.iterations), "seconds": record.wall_s}


def _claim(judgement: Judgement, kind: str) -> dict[str, Any]:
    gain = judgement.gain
    return {"claim": judgement.claim.text, "of": {"claims": "the paper's words", "orders": "the paper's numbers", "controls": "ours"}[kind],
            "gain": gain and gain.mean, "interval": gain and gain.interval, "samples": gain and gain.n, "verdict": judgement.verdict,
            "reason": judgement.reason, "caution": judgement.caution}


def write_csv(groups: Sequence[Group], root: Path = Path()) -> list[Path]:
    """Write results/csv/<name>.csv for each group; the files."""
    files: dict[Path, list[Group]] = {}
    for group in groups:                                     # one folder's groups, which differ in a condition, share a file
        files.setdefault(root / FOLDER / f"{group.name}.csv", []).append(group)
    for path, members in files.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for group in members:
            writer.writerows(_lines(group))
        write_file(path, text.getvalue())
    return list(files)


def _lines(group: Group) -> Iterator[list[Any]]:
    conditions = group.conditions
    for name in group.table.names:
        for column in group.table.columns or [""]:
            nets, mean = group.table.published(name, column), group.table.published_mean(name, column)
            for record in group.of(name):
                last, best = (group.value(record, which, column) for which in ("last", "best"))
                printed = nets[record.net - 1] if record.net <= len(nets) else mean
                yield [group.table.name, name, record.method, column, record.repeat, record.net, group.table.metric, _text(last),
                       _text(best), "" if printed is None else printed, f"{record.scale:g}", record.seed,
                       "+".join(map(str, record.iterations)), f"{record.wall_s:.0f}", conditions["device"], conditions["precision"],
                       conditions["engine"]]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
