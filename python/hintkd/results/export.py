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
COLUMNS = ("table", "method", "replication", "net", "metric", "last", "best", "published", "scale", "seed", "iterations", "seconds",
           "device", "precision", "engine")


def as_data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every group as JSON has it: its conditions, the values of every method in percent of the table's metric, its claims with verdicts."""
    return [{"name": group.name, "table": group.table.name, "title": group.table.title, "metric": group.table.metric,
             "conditions": group.conditions, "methods": [_method(group, method) for method in group.table.methods if group.of(method)],
             "claims": [_claim(group.judge(claim, groups), kind) for kind in ("claims", "orders", "controls")
                        for claim in getattr(group.table, kind)]} for group in groups]


def _method(group: Group, method: str) -> dict[str, Any]:
    found = overall(group.values(method))
    return {"method": method, "published": group.table.row(method).published_mean, "mean": found and found.mean,
            "deviation": found and found.deviation, "nets": [_net(group, record) for record in group.of(method)]}


def _net(group: Group, record: Record) -> dict[str, Any]:
    return {"replication": record.repeat, "net": record.net, "last": record.percent(group.table.metric),
            "best": record.percent(group.table.metric, "best"), "iterations": list(record.iterations), "seconds": record.wall_s}


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
    metric, conditions = group.table.metric, group.conditions
    for method in group.table.methods:
        row = group.table.row(method)
        for record in group.of(method):
            printed = row.published[record.net - 1] if record.net <= len(row.published) else row.published_mean
            yield [group.table.name, method, record.repeat, record.net, metric, f"{record.percent(metric):.6g}",
                   f"{record.percent(metric, 'best'):.6g}", "" if printed is None else printed, f"{record.scale:g}", record.seed,
                   "+".join(map(str, record.iterations)), f"{record.wall_s:.0f}", conditions["device"], conditions["precision"],
                   conditions["engine"]]
