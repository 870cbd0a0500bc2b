"""A paper's table or figure as data: what was trained, what was reported, what is claimed; one schema for all, checked when it is read.

A table turns into Experiments, one per net of each row, by what a run adds: scale, seed, rows.  What an experiment
consists of is the business of methods/; what was measured for it that of results/.
"""
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from hintkd import experiment, limits
from hintkd.errors import UserError
from hintkd.experiment import Experiment, Trained
from hintkd.methods.method import Method
from hintkd.methods.papers import PAPERS, Paper, own_methods, paper
from hintkd.metrics import METRICS, Metric
from hintkd.seeds import TABLE_SEEDS
from hintkd.study.claims import ClaimField, require_compared
from hintkd.study.fields import built, changed, checked, expanded, names_of, near, path_of, place_of
from hintkd.study.names import FOLDERS, in_a_name
from hintkd.study.names import table_names as table_names
from hintkd.study.rows import ORIGINAL, TEACHER, DataSet, Learner, Row, dataset_in, dataset_of, learner_of
from hintkd.study.yaml_file import read_yaml

_PLAIN = ("test_loss", "regressor", "hint_pairs", "tau", "lambda_", "lambda_schedule", "lambda_end")
_OF_AN_EXPERIMENT = ("dataset", "student", "teacher", "schedule", "options", *_PLAIN)     # of a table: what experiments are made of


# -------------------------------------------------------------------------------------------------------------------- schema

class Table(BaseModel):
    """One table or figure of a paper."""
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))

    title: str
    about: str = ""
    source: str
    paper: str = PAPERS[0]                                   # whose methods and options these are
    own: str | None = Field(None, alias="methods")           # a file of methods of one's own, or an entry point (methods/papers.py)
    dataset: DataSet
    metric: str = "accuracy"                                 # of published values
    columns: dict[str, str] = {}                             # of rows with several numbers: name -> test output; claims compare the last
    teacher: Learner | None = None
    student: Learner
    test_loss: bool = False                                  # Stage 2 is also tested under its own loss, which takes the teacher's time
    regressor: bool = False
    hint_pairs: tuple[tuple[str, str], ...] = ()             # (hint layer, guided layer) by hand, bottom up
    schedule: dict[str, Any] = {}                            # what is not given is the data set's
    tau: float = 3.0
    lambda_: float = Field(5.0, alias="lambda")
    lambda_schedule: str = "fixed"
    lambda_end: float = 1.0
    options: dict[str, Any] = {}
    nets: int = Field(3, ge=1)
    seed: int = Field(0, ge=0, lt=TABLE_SEEDS)               # of Stage 1 and the nets; the teacher and the original student do without
    rows: tuple[Row, ...]
    claims: tuple[ClaimField, ...] = ()                      # what the paper says in words
    orders: tuple[ClaimField, ...] = ()                      # what its printed numbers, or its drawn bars, imply beside that
    controls: tuple[ClaimField, ...] = ()                    # comparisons of ours
    draw: tuple[Literal["bars", "curves", "hint-losses"], ...] = ("bars", "curves", "hint-losses")
    axis: tuple[float, float] | None = None                  # as printed, in the metric's unit
    window: tuple[int, int] | None = None                    # the iterations of the last stage that are shown, of the full schedule
    departures: tuple[str, ...] = ()                         # from the paper
    notes: tuple[str, ...] = ()
    _name: str = PrivateAttr("table")
    _known: Paper | None = PrivateAttr(None)                 # None where a file of methods is gone: the table can be shown, and not run
    _folder: Path = PrivateAttr(Path())

    @model_validator(mode="before")
    @classmethod
    def _published_by_column(cls, given: Any) -> Any:
        """Rows whose `published` is a mapping have their columns there; the last column is what the row is compared by."""
        if not isinstance(given, dict) or not isinstance(given.get("rows"), (list, tuple)):
            return given
        last = [*given.get("columns", {})][-1:]

        def read(row: Any) -> Any:
            if not isinstance(row, dict) or not isinstance(row.get("published"), dict):
                return row
            values = row["published"]
            own = values.get(last[0]) if last else None
            main = {"average": own} if isinstance(own, (int, float)) else {"published": own or ()}
            return {**{name: value for name, value in row.items() if name != "published"}, **main, "columns": values}
        return {**given, "rows": [read(row) for row in given["rows"]]}

    @property
    def name(self) -> str:
        """The file's name without .yaml, and what was changed: results lie in a folder of this name."""
        return self._name

    @property
    def missing(self) -> str:
        """The file of methods of a table that can only be shown, because it is gone; "" otherwise."""
        return "" if self._known else str(self._folder / str(self.own))

    @property
    def folders(self) -> tuple[str, ...]:
        """Where Python layers of one's own may lie: beside the file of methods."""
        return (str((self._folder / self.own).parent.resolve()),) if self.own and self.own.endswith(".py") else ()

    @property
    def measure(self) -> Metric:
        """The metric itself."""
        return METRICS[self.metric]

    @property
    def output(self) -> str:
        """The test output that rows are compared by, where they have it: the last column's, or else the metric's."""
        return [self.measure.output, *self.columns.values()][-1]

    @property
    def set_by_rows(self) -> set[str]:
        """What rows have of their own, as records call it: an option by its name, all of a network, a teacher or the schedule by theirs."""
        schedule = names_of(self._known.schedule) if self._known else []
        presets = self._known.presets if self._known else {}
        return {first if (first := name.partition(".")[0]) not in schedule else "schedule"
                for row in self.rows for name in expanded(row.set, presets)}

    def default_options(self) -> dict[str, object]:
        """The paper's options with their defaults; none where its file is gone."""
        return self._known.options().as_dict() if self._known else {}

    def matters(self, option: str) -> bool:
        """Whether an option can change the results of some row."""
        if self._known is None:
            return True
        matters = next(field.metadata.get("matters", bool) for field in dataclasses.fields(self._known.options) if field.name == option)
        return any(matters(self.experiment(name)) for name in self.names)

    @property
    def names(self) -> list[str]:
        """All that has results: the teacher, the original student, then the rows."""
        named = [row.title for row in self.rows]
        teacher = [TEACHER] if self.teacher is not None and self.teacher.weights is None else []
        return [*(name for name in (*teacher, ORIGINAL) if name not in named), *named]

    def row(self, name: str) -> Row:
        """A row; the teacher's and the original student's, which are implied, have one published value."""
        for row in self.rows:
            if row.title == name:
                return row
        learner = self.teacher if name == TEACHER else self.student
        return Row.model_construct(method=name, average=learner.published if learner else None)

    def published(self, name: str, column: str = "") -> tuple[float, ...]:
        """What was printed of a row's nets, in one of its columns if one is named."""
        row = self.row(name)
        return row.printed(column) if column in row.columns else () if column else row.published

    def published_mean(self, name: str, column: str = "") -> float | None:
        """Of the nets where they were printed, because printed averages are truncated; or else the average that was printed."""
        values = self.published(name, column)
        return sum(values) / len(values) if values else None if column and column != [*self.columns][-1] else self.row(name).average

    def iterations(self, scale: float) -> str:
        """Of every kind of stage at a scale, in words."""
        return built(self._known.schedule, self._schedule(), "schedule").scaled(scale).sentence() if self._known else "not known"

    def method(self, name: str) -> Method | None:
        """The method of a row; None where the file that it was in is gone."""
        return self._known.methods.get(self.row(name).method) if self._known else None

    def nets_of(self, name: str) -> int:
        """How many nets a row has: one where all share it."""
        return 1 if self.is_shared(name) else self.nets

    def is_shared(self, name: str) -> bool:
        """Whether there is one of it for all nets, as of a teacher."""
        method = self.method(name)
        return method.is_shared if method else self.row(name).method == TEACHER

    # -- experiments ---------------------------------------------------------------------------------------------------------
    def experiments(self, *, rows: Sequence[str] | None = None, nets: Sequence[int] | None = None, scale: float = 1.0, seed: int = 1,
                    repeat: int = 1) -> list[Experiment]:
        """One Experiment per net and row, the teacher first (net 1; only if something chosen needs it).

        rows, nets        the ones to run, None for all; nets are counted from 1
        repeat            1, 2, ...: a complete replication, with other seeds for teacher, Stage 1 and nets
        Raises UserError on a row that the table does not have.
        """
        for name in rows or ():
            if name not in self.names:
                raise UserError(f"{self.name} has no row {name!r}; {near(name, self.names)}")
        chosen = [name for name in self.names if rows is None or name in rows]
        if TEACHER in self.names and TEACHER not in chosen and any((m := self.method(name)) and m.needs_teacher for name in chosen):
            chosen = [TEACHER, *chosen]
        return [self.experiment(name, net, scale, seed, repeat) for name in chosen
                for net in ([1] if self.is_shared(name) else nets or range(1, self.nets + 1))]

    def experiment(self, name: str, net: int = 1, scale: float = 1.0, seed: int = 1, repeat: int = 1) -> Experiment:
        """One net of one row.  Raises UserError on what does not fit together, and where the table's file of methods is gone."""
        known = self._known
        if known is None:
            raise UserError(f"{self.name}: its file of methods, {self.missing}, is gone; put it there to go on")
        row = self.row(name)
        method = known.methods.get(row.method)
        if method is None:
            raise UserError(f"method: {row.method!r} is not a method; {near(row.method, list(known.methods))}")
        s = self._settings(row.set, known)
        dataset = dataset_of(s["dataset"])
        schedule = built(known.schedule, {**dataclasses.asdict(known.schedules.get(dataset.name, known.schedule())), **s["schedule"]},
                         "schedule")
        options = built(known.options, s["options"], "options")
        student = learner_of(s["student"], "student")
        own = {name: checked(Table.model_fields[name].annotation, s[_alias(name)], _alias(name)) for name in _PLAIN}
        run = {**own, "table": self.name, "options": options, "seed": seed, "repeat": repeat, "scale": scale}

        def taught_by(learner: Learner | None, pupil: experiment.Network, generation: int) -> Experiment | Trained | None:
            place = "teacher" + ".teacher" * (generation - 1)
            if learner is None:
                return None
            network = learner.network(place)
            if learner.weights:
                return Trained(learner.weights, learner.prototxt, network)
            trained_by = known.methods.get(learner.method)
            if trained_by is None:
                raise UserError(f"{place}.method: {learner.method!r} is not a method; {near(learner.method, list(known.methods))}")
            longer = dataclasses.replace(schedule, iterations=schedule.teacher_iterations)
            return Experiment(trained_by, learner.dataset or dataset, network, taught_by(learner.teacher, network, generation + 1),
                              generation=generation, pupil=pupil, schedule=longer, **{**run, "test_loss": False})

        network = student.network("student")
        teacher = taught_by(learner_of(s["teacher"], "teacher") if s["teacher"] else None, network, 1)
        if method.needs_teacher and teacher is None:
            raise UserError(f"method: {row.method!r} needs a teacher; add one")
        return Experiment(method, dataset, network, teacher, net=net, row=row.name, schedule=schedule, table_seed=self.seed, **run)

    def _settings(self, changes: Mapping[str, Any], known: Paper) -> dict[str, Any]:
        """What experiments are made of, with the changes of a row, as YAML has it; the data set by its fields."""
        settings = self.model_dump(by_alias=True, include={*_OF_AN_EXPERIMENT, "lambda_"})
        settings["dataset"] = dataclasses.asdict(self.dataset)
        for name, value in expanded(changes, known.presets).items():
            settings = _with(settings, self._path(name, known), value)
        return settings

    def _path(self, name: str, known: Paper) -> tuple[str, ...]:
        """Where a change acts.  Raises UserError on an unknown name."""
        if name.startswith("teacher.") and self.teacher is None:
            raise UserError(f"{name}: there is no teacher to be changed")
        return path_of(name, {"": [_alias(each) for each in _OF_AN_EXPERIMENT], "options": names_of(known.options),
                              "schedule": names_of(known.schedule)})

    # -- changing ------------------------------------------------------------------------------------------------------------
    def changed(self, changes: Mapping[str, Any] | None = None, data: Path | None = None) -> Table:
        """The table with other values for all rows that do not set them, or on data of one's own, under a name that says so.

        changes    by name, as in a row's `set`
        data       a folder with train_lmdb, test_lmdb and the two mean files (if the table's data set has them)
        Published numbers are dropped unless only options and presets, which fill what the paper leaves open, were changed.  Raises
        UserError on what does not fit.
        """
        known = self._known
        assert known is not None
        content, name, comparable = self._content(), self.name, True
        for what, value in (changes or {}).items():
            settings = {self._path(each, known): given for each, given in expanded({what: value}, known.presets).items()}
            if what != "teacher.prototxt":
                alone = table_of(_with_all(self._content(), settings), self.name, self.name, self._folder)
                if alone.experiment(ORIGINAL) == self.experiment(ORIGINAL):
                    continue                                 # it is so already
                name += f"-{in_a_name(what, value)}"
            content = _with_all(content, settings)
            comparable = comparable and (what == "preset" or all(path[0] == "options" for path in settings))
        teacher = content["teacher"] or {}
        if teacher.get("prototxt") and not teacher.get("weights"):
            raise UserError("a teacher's prototxt was given without its weights: give both, or neither")
        if data:
            dataset = dataset_in(data, dataset_of(content["dataset"]))
            content["dataset"] = dataclasses.asdict(dataset)
            if dataset.name != self.dataset.name:
                comparable, name = False, f"{name}-{dataset.name}"
        if content == self._content():
            return self
        if not comparable:
            for learner in filter(None, (content["teacher"], content["student"])):
                learner["published"] = None
            for row in content["rows"]:
                row.update(published=(), average=None, columns={})
            content["axis"] = None
        return table_of(content, name, self.name, self._folder)

    def _content(self) -> dict[str, Any]:
        """What the table is made of, the data set and its schedule by all their fields."""
        return {**self.model_dump(by_alias=True), "dataset": dataclasses.asdict(self.dataset), "schedule": self._schedule()}

    def _schedule(self) -> dict[str, Any]:
        """The schedule's fields, those of the data set where the table does not say."""
        if self._known is None:
            return self.schedule
        known = dataclasses.asdict(self._known.schedules.get(self.dataset.name, self._known.schedule()))
        return {**{name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}, **self.schedule}

    def dump(self, folder: Path) -> str:
        """The table as YAML that `load_table` reads back from a file in `folder`, however it was made."""
        content = {"name": self.name, **self.model_dump(mode="json", by_alias=True, exclude_defaults=True)}
        if self.own and self.own.endswith(".py"):
            content["methods"] = os.path.relpath(self._folder / self.own, folder)
        content["schedule"] = self._schedule()
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=130)


    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were read."""
        return isinstance(other, Table) and yaml.safe_load(self.dump(Path())) == yaml.safe_load(other.dump(Path()))

    __hash__ = None  # type: ignore[assignment]


def _with(settings: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Settings with one value; a data set, which may be given by its name, by all its fields."""
    return changed(settings, path, dataclasses.asdict(dataset_of(value)) if tuple(path) == ("dataset",) else value)


def _with_all(settings: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The same with several."""
    made = dict(settings)
    for path, value in changes.items():
        made = _with(made, path, value)
    return made


# ------------------------------------------------------------------------------------------------------------------- reading

def find_table(name: str | Path) -> Table:
    """The table of this name (`table3`), or in this file (a path that ends in .yaml).  Raises UserError if there is none."""
    if str(name).endswith((".yaml", ".yml")):
        return load_table(Path(name))
    for folder in FOLDERS:
        if (folder / f"{name}.yaml").is_file():
            return load_table(folder / f"{name}.yaml")
    raise UserError(f"there is no table {str(name)!r}; {near(name, table_names())}")


def load_table(path: Path, shown: bool = False) -> Table:
    """Read and check a table's YAML.  Raises UserError naming the file, the field and, for a misspelt one, the nearest known name.

    shown    it is only to be shown: a file of methods may be gone
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a table is a YAML mapping with title, source, dataset, student and rows")
    return table_of(content, str(content.pop("name", path.stem)), str(path), path.parent, shown)


def table_of(content: dict[str, Any], name: str, where: str, folder: Path, shown: bool = False) -> Table:
    """The table with this content.

    name      as results are called
    where     it stands, for what is said of a mistake
    folder    in which a file of methods is looked for
    shown     it is only to be shown: that file may be gone
    Raises UserError as load_table does.
    """
    if not re.fullmatch(r"\w[\w.-]{0,150}", name):
        raise UserError(f"{where}: name: '{limits.shown(name)}' cannot name a folder; use letters, digits, '-', '_' and '.', not too many")
    limits.require_all(content, where)
    try:
        table = Table.model_validate(content)
        table._name, table._folder = name, folder
        _bind(table, shown)
        _check(table)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return table


def _bind(table: Table, shown: bool) -> None:
    """Find the paper, and the methods of one's own."""
    table._known = paper(table.paper)
    if table.own:
        try:
            table._known = table._known.with_own(*own_methods(table.own, table._folder))
        except UserError:
            if not shown:
                raise
            table._known = None


def _check(table: Table) -> None:
    """What the schema cannot say.  Raises UserError."""
    if table.metric not in METRICS:
        raise UserError(f"metric: {table.metric!r} is not a metric; {near(table.metric, list(METRICS))}")
    taken: set[str] = set()
    for index, row in enumerate(table.rows):
        if row.title in taken:
            raise UserError(f"rows[{index}].method: {row.title!r} is there already; give the row a name of its own")
        if not re.fullmatch(r"\w[\w.-]*", row.title):
            raise UserError(f"rows[{index}].name: {row.title!r} cannot name a folder; use letters, digits, '-', '_' and '.'")
        taken.add(row.title)
        if row.published and len(row.published) != table.nets_of(row.title):
            raise UserError(f"rows[{index}].published: {len(row.published)} values for {table.nets_of(row.title)} nets; give one for each")
        unknown = [column for column in row.columns if column not in table.columns]
        if unknown:
            raise UserError(f"rows[{index}].published: the table has no column {unknown[0]!r}; {near(unknown[0], list(table.columns))}")
        for value in (*row.published, *(number for column in row.columns for number in row.printed(column))):
            if table.measure.unit == "%" and not 0 <= value <= 100:
                raise UserError(f"rows[{index}].published: {value:g} is no percentage")
        _check_experiment(table, row, index)
    if table._known:
        table.experiment(ORIGINAL)
    for kind, claims in (("claims", table.claims), ("orders", table.orders), ("controls", table.controls)):
        require_compared(kind, claims, table.names, list(table.columns), table.test_loss)


def _check_experiment(table: Table, row: Row, index: int) -> None:
    """That the row makes an experiment; UserError says where."""
    if table._known is None:
        return
    try:
        table._settings(row.set, table._known)
    except UserError as error:
        raise UserError(f"rows[{index}].set.{error}") from None
    try:
        table.experiment(row.title)
    except UserError as error:
        raise UserError(f"rows[{index}].{error}" if str(error).startswith("method:") else f"rows[{index}]: {error}" if row.set else
                        str(error)) from None


def _alias(name: str) -> str:
    """As YAML calls a field of a table."""
    return Table.model_fields[name].alias or name


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong: the field as `rows[2].method`, and what to do.  A misspelt field explains one that is missing."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = place_of(first["loc"])
    if first["type"] == "extra_forbidden":
        kind = Row if first["loc"][0] == "rows" else Table
        return f"{place}: unknown field; {near(first['loc'][-1], [field.alias or name for name, field in kind.model_fields.items()])}"
    text = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{place}: {text}" if place else text
