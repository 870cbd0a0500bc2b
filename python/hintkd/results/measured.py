"""What was measured: the records in results/measured, read, checked and gathered into groups that may stand in one table.

Records of one folder that were measured under different conditions (scale, options, device, engine ...) never share a table: each
set of conditions is a Group of its own.  Claims are judged here; how a group is shown is the report's business.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hintkd.backend import engine
from hintkd.errors import Damaged, UserError
from hintkd.files import read_sealed
from hintkd.metrics import Metric
from hintkd.nets.stages import KD_LOSS
from hintkd.results import verdicts as statistics
from hintkd.results.verdicts import Spread, Values, Verdict
from hintkd.study.claims import Claim, Operand
from hintkd.study.names import in_order
from hintkd.study.probabilities import ensemble
from hintkd.study.table import Table, find_table, load_table

Curve = list[tuple[int, float]]                              # (iteration, value), by rising iteration
OF_A_ROW = ("tau", "lambda", "bn_fraction_of_run")           # choices that may differ between the rows of a table
ALONG_WITH = {"teacher": ("teacher_dataset", "teacher_method", "external_teacher"),        # choices that a row sets with another of them
              "dataset": ("batch",)}
AGAIN = "delete it and run `hintkd reproduce` again"
TAIL = 0.1                                                   # the end of a hint loss: its mean over this part of the curve


class _Read(BaseModel):
    """A part of a record; what is not named here is for others."""
    model_config = ConfigDict(extra="ignore", frozen=True)


class Best(_Read):
    value: float
    iteration: int


class StageResult(_Read):
    title: str
    key: str
    iterations: int
    wall_s: float
    loss: Curve = []
    train: dict[str, Curve] = {}
    test: dict[str, Curve] = {}
    hints: dict[str, str] = {}                               # loss of Stage 1 -> the teacher's layer that it is the distance from
    inexact: bool = False
    together: int = 1                                        # how many trained side by side, this one among them


class Weights(_Read):
    """The trained net that is kept with a record: its caffemodel, relative to the workspace, and the digest of that."""
    file: str
    sha256: str


class Provenance(_Read):
    machine: str
    cpu: str | None = None
    cores: int | None = None
    gpu: str | None = None
    threads: int | None = None
    device: str
    precision: str
    python: str | None = None
    torch: str | None = None
    engine: str | None = None
    backend: str
    commit: str | None = None
    dirty: bool | None = None


class Record(_Read):
    """One trained net: hintkd.study.record writes it.  Rates are fractions, 0 to 1."""
    schema_: Literal[1] = Field(alias="schema")
    table: str
    method: str
    row: str = ""                                            # its name, where that is not the method's
    net: int
    repeat: int = 1
    scale: float
    seed: int
    options: dict[str, Any]
    choices: dict[str, Any] = {}
    metric: str
    last: dict[str, float]
    best: dict[str, Best]
    iterations: tuple[int, ...]
    wall_s: float
    stages: tuple[StageResult, ...]
    provenance: Provenance
    weights: Weights | None = None

    @property
    def name(self) -> str:
        """Of its row."""
        return self.row or self.method

    @property
    def cell(self) -> tuple[int, int]:
        return self.repeat, self.net

    def conditions(self, table: Table) -> dict[str, str]:
        """What the records of a table share: all but what its rows set; an option that came after the record has its default."""
        p = self.provenance
        shared = {"scale": f"{self.scale:g}", "seed": str(self.seed), "device": p.gpu or p.device,
                  "precision": p.precision, "backend": p.backend, "engine": p.engine or "not recorded"}
        choices = {name: json.dumps(value) for name, value in self.choices.items() if name not in OF_A_ROW}
        options = {**table.default_options(), **self.options}
        found = {**shared, **{name: str(value) for name, value in options.items()}, **choices}
        own = {name for first in table.set_by_rows for name in (first, *ALONG_WITH.get(first, ()))}
        return {name: value for name, value in found.items() if name not in own}

    def value(self, metric: Metric, which: str = "last", output: str = "") -> float | None:
        """The result in a metric, after the last iteration or at the best test; of another test output than the metric's if one is named.

        None where it has none, such as a best value of what is counted at the end alone.
        """
        name = output if output in self.last else metric.output
        if which == "last":
            return metric.value(self.last[name]) if name in self.last else None
        return metric.value(self.best[name].value) if name in self.best else None

    def hint_losses(self) -> dict[str, tuple[str, Curve]]:
        """Per pair ("1", "2", "3"; "" for a single one) its hint layer and the loss of Stage 1; steps follow each other."""
        curves: dict[str, tuple[str, Curve]] = {}
        begun = 0
        for stage in self.stages[:-1]:
            for name, curve in stage.train.items():
                found = re.fullmatch(r"hint(\d*)_loss", name)
                if found and curve:
                    curves[found[1]] = stage.hints.get(name, f"of {name}"), [(begun + iteration, value) for iteration, value in curve]
            begun += stage.iterations
        return curves


@dataclass(frozen=True)
class Judgement:
    """A claim, the gain of its better side, and what that means; `reason` says why it could not be judged."""
    claim: Claim
    gain: Spread | None
    verdict: Verdict
    reason: str = ""

    @property
    def caution(self) -> str:
        """What a reader should know beside the verdict."""
        return "the best net is the one that does best on this very test set, which favours it" if self.claim.left.best else ""


@dataclass(frozen=True)
class Group:
    """The records of one table under one set of conditions."""
    name: str                                                # of the folder they lie in
    table: Table
    records: tuple[Record, ...]
    ensembles: dict[str, dict[int, float]] = field(default_factory=dict)    # row -> replication -> accuracy of its nets together
    apart: tuple[str, ...] = ()                              # conditions in which it differs from the folder's other groups

    @property
    def conditions(self) -> dict[str, str]:
        return self.records[0].conditions(self.table)

    @property
    def scale(self) -> float:
        return self.records[0].scale

    @property
    def old_numeric(self) -> str:
        """The numeric of torchcaffe that measured it, where today's is another and would give other bytes; "" where it is today's."""
        measured, today = (re.search(r"numeric (\d+)$", text) for text in (self.conditions["engine"], engine("torchcaffe")))
        return measured[1] if measured and today and measured[1] != today[1] else ""

    @property
    def is_full(self) -> bool:
        """Whether it ran the paper's own schedule, so that published values can be compared."""
        return self.scale == 1

    @cached_property
    def repeats(self) -> list[int]:
        return sorted({record.repeat for record in self.records})

    def of(self, row: str) -> list[Record]:
        """A row's records, by replication and net."""
        return sorted((record for record in self.records if record.name == row), key=lambda record: record.cell)

    def value(self, record: Record, which: str = "last", column: str = "") -> float | None:
        """A record's value in the table's metric; that of its last column unless another is named."""
        columns = self.table.columns
        if column and [*columns][-1:] != [column] and columns.get(column) not in record.last:
            return None
        return record.value(self.table.measure, which, self.table.columns.get(column, self.table.output))

    def values(self, row: str, which: str = "last", column: str = "") -> Values:
        """The values of a row's records, per (replication, net)."""
        found = {record.cell: self.value(record, which, column) for record in self.of(row)}
        return {cell: value for cell, value in found.items() if value is not None}

    @cached_property
    def _begun(self) -> dict[tuple[int, str], float]:
        """Per replication and hint layer the largest loss with which a method of the table begins to approach it."""
        begun: dict[tuple[int, str], float] = {}
        for record in self.records:
            for hint, curve in record.hint_losses().values():
                begun[record.repeat, hint] = max(curve[0][1], begun.get((record.repeat, hint), 0.0))
        return begun

    def hint_losses(self, record: Record) -> dict[str, Curve]:
        """Per pair the loss of Stage 1, whatever the method in units of the largest with which any of them begins at that layer."""
        return {pair: [(iteration, value / self._begun[record.repeat, hint]) for iteration, value in curve]
                for pair, (hint, curve) in record.hint_losses().items() if self._begun[record.repeat, hint]}

    def _measure(self, record: Record, claim: Claim) -> float | None:
        """What a claim compares, so that more is better; None if the record does not have it."""
        if claim.measure == "" or claim.column:
            value = self.value(record, column=claim.column)
            return None if value is None else self.table.measure.gain(value, 0)
        if claim.aim is not None:
            return self._iterations_to(record, claim.aim)
        if claim.measure in ("training loss", "test loss"):
            begin, end = self.table.window or (0, record.iterations[-1] / self.scale)
            curve = record.stages[-1].loss if claim.measure == "training loss" else record.stages[-1].test.get(KD_LOSS, [])
            values = [value for iteration, value in curve if begin * self.scale <= iteration <= end * self.scale]
        else:
            curve = self.hint_losses(record).get(claim.measure.removeprefix("hint loss "), [])
            values = [value for _, value in curve[-max(1, round(TAIL * len(curve))):]]
        return -sum(values) / len(values) if values else None

    def _iterations_to(self, record: Record, aim: float) -> float | None:
        """Of the full schedule's last stage, with a minus, up to the first test whose value is as good as `aim`; None without tests."""
        curve = record.stages[-1].test.get(self.table.output, [])
        reached = (iteration for iteration, value in curve if self.table.measure.gain(self.table.measure.value(value), aim) >= 0)
        return -next(reached, record.iterations[-1]) / self.scale if curve else None

    def _compared(self, operand: Operand, claim: Claim) -> Values:
        values = {record.cell: value for record in self.of(operand.method) if (value := self._measure(record, claim)) is not None}
        if claim.measure.startswith("hint loss"):            # nets share Stage 1: it counts once in each replication
            return {(repeat, 1): value for (repeat, _), value in sorted(values.items(), reverse=True)}
        return values

    def judge(self, claim: Claim, groups: Sequence[Group]) -> Judgement:
        """Whether a claim holds here; `groups` are searched for the other table that it names."""
        sides: list[Values] = []
        for operand in (claim.left, claim.right):
            source = self if operand.table is None else self._like_this(operand.table, groups)
            values = source._compared(operand, claim) if source else {}
            if not values:
                what = f"{operand.table}/{operand.method}" if operand.table else operand.method
                absent = f"was not measured{' under these conditions' if operand.table else ''}"
                return Judgement(claim, None, "not judged", f"{what} has no {claim.measure}" if source and source.of(operand.method)
                                 else f"{what} {absent}")
            sides.append(values)
        left, right = sides
        if self.table.is_shared(claim.right.method):
            right = statistics.over_nets(right, left)
        elif self.table.is_shared(claim.left.method):
            left = statistics.over_nets(left, right)
        gain = statistics.against_best(left, right) if claim.left.best else statistics.difference(left, right)
        if gain is not None and not claim.better:
            gain = Spread(-gain.mean, gain.deviation, gain.n)
        reason = "the two have no net in common" if gain is None else "one value only, so there is no interval"
        return Judgement(claim, gain, statistics.verdict(gain), "" if gain and gain.error is not None else reason)

    def _like_this(self, table: str, groups: Sequence[Group]) -> Group | None:
        """The group of another table that was measured under the same conditions, networks and data apart."""
        def conditions(group: Group) -> dict[str, str]:
            return {name: value for name, value in group.conditions.items() if name not in group.records[0].choices}
        return next((group for group in groups if group.table.name == table and conditions(group) == conditions(self)), None)


# ------------------------------------------------------------------------------------------------------------------- reading

def read_record(path: Path) -> Record:
    """A record from its file.  Raises UserError naming the file and the field that is wrong."""
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not a record of a run: {place + ': ' if place else ''}{first['msg']}; {AGAIN}") from None
    try:
        read_sealed(path)
    except Damaged as damage:
        raise UserError(f"{damage}; {AGAIN}") from None
    if record.metric not in record.last:
        raise UserError(f"{path}: its metric {record.metric!r} is not among its results {sorted(record.last)}; {AGAIN}")
    return record


def read_groups(measured: Path, name: str | None = None) -> list[Group]:
    """All that was measured, in the paper's order of tables; `name` asks for one folder.

    Raises UserError for a damaged record, and for one of a table that is not known.
    """
    groups: list[Group] = []
    for folder in sorted(path for path in measured.glob("*") if path.is_dir() and name in (None, path.name)):
        files = sorted(folder.glob("**/net*.json"))
        if files:
            records = {path: read_record(path) for path in files}
            groups += _apart(folder, _table_of(folder, next(iter(records.values()))), records)
    return sorted(groups, key=lambda group: (*in_order(group.table.name), -group.scale, group.name))


def _apart(folder: Path, table: Table, records: Mapping[Path, Record]) -> list[Group]:
    by_conditions: dict[tuple[tuple[str, str], ...], dict[Path, Record]] = {}
    for path, record in records.items():
        by_conditions.setdefault(tuple(record.conditions(table).items()), {})[path] = record
    differing = sorted({name for one in by_conditions for name, value in one if any((name, value) not in other for other in by_conditions)})
    return [Group(folder.name, table, tuple(members.values()), _ensembles(table, members), tuple(differing))
            for members in by_conditions.values()]


def _ensembles(table: Table, records: Mapping[Path, Record]) -> dict[str, dict[int, float]]:
    """Per row and replication the accuracy of all the nets of a row together, a fraction; not before they are all there.

    Raises UserError for class probabilities that are damaged.
    """
    kept: dict[tuple[str, int], dict[int, Path]] = {}
    for path, record in records.items():
        if path.with_suffix(".npz").exists():
            kept.setdefault((record.name, record.repeat), {})[record.net] = path.with_suffix(".npz")
    found: dict[str, dict[int, float]] = {}
    for (name, repeat), paths in sorted(kept.items()):
        if table.nets > 1 and paths.keys() == set(range(1, table.nets + 1)):
            try:
                found.setdefault(name, {})[repeat] = ensemble([path for _, path in sorted(paths.items())])
            except Damaged as damage:
                raise UserError(f"{damage}; {AGAIN}") from None
    return found


def _table_of(folder: Path, record: Record) -> Table:
    """The table that a folder's records belong to: table.yaml beside them, or the paper's of the name they give."""
    own = folder / "table.yaml"
    if own.is_file():
        return load_table(own, shown=True)
    try:
        return find_table(record.table)
    except UserError as error:
        raise UserError(f"{folder}: {error}; a table of your own belongs beside its results, as {own}") from None
