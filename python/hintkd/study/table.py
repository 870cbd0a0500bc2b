"""A paper's table or figure as data: what was trained, what was reported, what is claimed; one schema for all, checked when it is read.

A table turns into Experiments, one per net of each row, by the settings of a run: scale, seed, methods.  What an experiment
consists of is the business of methods/; what was measured for it that of measured.py.
"""
from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from hintkd import limits
from hintkd.backend import count_records
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, SCHEDULES, Dataset, Experiment, ExternalTeacher, Options, ResNet, Schedule
from hintkd.files import read_sealed
from hintkd.methods.hint_2019 import METHODS
from hintkd.seeds import TABLE_SEEDS
from hintkd.study.claims import ClaimField
from hintkd.study.names import FOLDERS
from hintkd.study.names import table_names as table_names
from hintkd.study.yaml_file import read_yaml

TEACHER, ORIGINAL = "teacher", "original"                    # rows of every table: the teacher (one net) and the student without one
WITHOUT_TEACHER = (ORIGINAL, "sl-resnet")


def near(name: object, known: Sequence[str]) -> str:
    """What to say after an unknown name: the nearest known one, or all of them."""
    close = get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"{name!r} is not a method; {near(name, list(METHODS))}")
    return name


def _named_dataset(given: Any) -> Any:
    if isinstance(given, str):
        if given not in DATASETS:
            raise ValueError(f"{given!r} is not a data set; {near(given, list(DATASETS))}")
        return DATASETS[given]
    return given


def _dataset_name(dataset: Dataset) -> Any:
    return next((name for name, known in DATASETS.items() if known == dataset), dataclasses.asdict(dataset))


DataSet = Annotated[Dataset, BeforeValidator(_named_dataset), PlainSerializer(_dataset_name)]      # a known one's name, or all its fields
Method = Annotated[str, AfterValidator(_known_method)]
Percent = Annotated[float, Field(ge=0, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# -------------------------------------------------------------------------------------------------------------------- schema

class Network(_Strict):
    """A teacher or student.  `published` is what the paper reports for it when it is trained on the labels alone."""
    depth: int
    widths: tuple[int, int, int] = (16, 32, 64)
    published: Percent | None = None
    dataset: DataSet | None = None                           # a teacher's own training set
    weights: Path | None = None                              # a trained teacher from elsewhere, and its net if that is not this one
    prototxt: Path | None = None

    @model_validator(mode="after")
    def _exists(self) -> Network:
        try:
            assert self.resnet
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def resnet(self) -> ResNet:
        return ResNet(self.depth, self.widths)


class Row(_Strict):
    """A method, and its published values in the table's metric: one per net, or only their average as it was printed."""
    method: Method
    published: tuple[Percent, ...] = ()
    average: Percent | None = None
    tau: float | None = None                                 # where they are not the table's
    lambda_: float | None = Field(None, alias="lambda")

    @property
    def published_mean(self) -> float | None:
        """Of the nets where they were printed, because printed averages are truncated."""
        return sum(self.published) / len(self.published) if self.published else self.average


class Table(_Strict):
    """One table or figure of a paper."""
    title: str
    about: str = ""
    source: str
    dataset: DataSet
    metric: Literal["accuracy", "error"] = "accuracy"        # of published values, percent; error is 100 - accuracy
    teacher: Network | None = None
    student: Network
    test_loss: bool = False                                  # Stage 2 is also tested under its own loss, which takes the teacher's time
    regressor: bool = False
    hint_pairs: tuple[tuple[str, str], ...] = ()             # (hint layer, guided layer) by hand, bottom up
    schedule: Schedule = Schedule()                          # what is not given is the data set's
    tau: float = 3.0
    lambda_: float = Field(5.0, alias="lambda")
    options: Options = Options()
    nets: int = Field(3, ge=1)
    seed: int = Field(0, ge=0, lt=TABLE_SEEDS)               # of Stage 1 and the nets; the teacher and the original student do without
    rows: tuple[Row, ...]
    claims: tuple[ClaimField, ...] = ()                      # what the paper says in words
    orders: tuple[ClaimField, ...] = ()                      # what its printed numbers, or its drawn bars, imply beside that
    controls: tuple[ClaimField, ...] = ()                    # comparisons of ours
    draw: tuple[Literal["bars", "curves", "hint-losses"], ...] = ("bars", "curves", "hint-losses")
    axis: tuple[float, float] | None = None                  # as printed, percent
    window: tuple[int, int] | None = None                    # the iterations of the last stage that are shown, of the full schedule
    departures: tuple[str, ...] = ()                         # from the paper
    notes: tuple[str, ...] = ()
    _name: str = PrivateAttr("table")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_schedule(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("schedule", {}), dict):
            known = SCHEDULES.get(str(given.get("dataset")), Schedule())
            return {**given, "schedule": {**dataclasses.asdict(known), **given.get("schedule", {})}}
        return given

    @model_validator(mode="after")
    def _check(self) -> Table:
        methods = [row.method for row in self.rows]
        for index, row in enumerate(self.rows):
            if row.method in methods[:index] or row.method == ORIGINAL:
                raise ValueError(f"rows[{index}].method: {row.method!r} is there already; a method has one row, {ORIGINAL!r} is implied")
            if row.published and len(row.published) != self.nets:
                raise ValueError(f"rows[{index}].published: {len(row.published)} values for {self.nets} nets; give one for each")
            if self.teacher is None and row.method not in WITHOUT_TEACHER:
                raise ValueError(f"rows[{index}].method: {row.method!r} needs a teacher; add one")
        for kind, claims in (("claims", self.claims), ("orders", self.orders), ("controls", self.controls)):
            for index, claim in enumerate(claims):
                if claim.measure == "test loss" and not self.test_loss:
                    raise ValueError(f"{kind}[{index}]: {claim.text!r} needs `test_loss: true` in the table")
                for side in (claim.left, claim.right):
                    if side.table is None and side.method not in self.methods:
                        raise ValueError(f"{kind}[{index}]: the table has no row {side.method!r}; {near(side.method, self.methods)}")
        return self

    @property
    def name(self) -> str:
        """The file's name without .yaml, and what was changed: results lie in a folder of this name."""
        return self._name

    @property
    def methods(self) -> list[str]:
        """All that has results: the teacher, the original student, then the rows."""
        teacher = [TEACHER] if self.teacher is not None and self.teacher.weights is None else []
        return [*teacher, ORIGINAL, *(row.method for row in self.rows)]

    def row(self, method: str) -> Row:
        """A row; the teacher's and the original student's, which are implied, have one published value."""
        for row in self.rows:
            if row.method == method:
                return row
        network = self.teacher if method == TEACHER else self.student
        return Row.model_construct(method=method, published=(), average=network.published if network else None)

    def experiments(self, *, methods: Sequence[str] | None = None, nets: Sequence[int] | None = None, scale: float = 1.0, seed: int = 1,
                    repeat: int = 1) -> list[Experiment]:
        """One Experiment per net and method, the teacher first (method "teacher", net 1; only if something chosen needs it).

        methods, nets     the ones to run, None for all; nets are counted from 1
        repeat            1, 2, ...: a complete replication, with other seeds for teacher, Stage 1 and nets
        Raises UserError on a method that the table does not have.
        """
        for method in methods or ():
            if method not in self.methods:
                raise UserError(f"{self.name} has no row {method!r}; {near(method, self.methods)}")
        chosen = [m for m in self.methods if methods is None or m in methods]
        if TEACHER in self.methods and TEACHER not in chosen and set(chosen) - set(WITHOUT_TEACHER):
            chosen = [TEACHER, *chosen]
        return [self._experiment(method, net, scale, seed, repeat) for method in chosen
                for net in ([1] if method == TEACHER else nets or range(1, self.nets + 1))]

    def _experiment(self, method: str, net: int, scale: float, seed: int, repeat: int) -> Experiment:
        row, teacher = self.row(method), self.teacher
        external = ExternalTeacher(teacher.weights, teacher.prototxt) if teacher and teacher.weights else None
        return Experiment(
            method=method, dataset=self.dataset, student=self.student.resnet, teacher=teacher.resnet if teacher else None, net=net,
            table=self.name, schedule=self.schedule, options=self.options, tau=self.tau if row.tau is None else row.tau,
            lambda_=self.lambda_ if row.lambda_ is None else row.lambda_, test_loss=self.test_loss, regressor=self.regressor,
            hint_pairs=self.hint_pairs,
            teacher_dataset=teacher.dataset if teacher else None, external_teacher=external, seed=seed,
            table_seed=self.seed, repeat=repeat, scale=scale)

    def changed(self, *, teacher_depth: int | None = None, student_depth: int | None = None, teacher_weights: Path | None = None,
                teacher_prototxt: Path | None = None, data: Path | None = None, options: Mapping[str, Any] | None = None) -> Table:
        """The table with other networks, a teacher or data of one's own, or other options, under a name that says so.

        data     a folder with train_lmdb, test_lmdb and the two mean files (if the table's data set has them)
        Published numbers are dropped where other networks or data were used.  Raises UserError on what does not fit.
        """
        new, name = self.model_dump(by_alias=True), self.name
        teacher, student = new["teacher"], new["student"]
        comparable = True
        if teacher is None and (teacher_depth or teacher_weights):
            raise UserError(f"{self.name} has no teacher to be changed")
        if self.teacher and teacher_depth not in (None, self.teacher.depth):
            teacher["depth"], comparable = teacher_depth, False
            name += f"-teacher{teacher_depth}"
        if student_depth not in (None, self.student.depth):
            student["depth"], comparable = student_depth, False
            name += f"-student{student_depth}"
        if teacher_prototxt and not teacher_weights:
            raise UserError("a teacher's prototxt was given without its weights: give both, or neither")
        if teacher_weights:
            teacher.update(weights=teacher_weights, prototxt=teacher_prototxt, dataset=None)
            comparable, name = False, f"{name}-{teacher_weights.stem}"
        if data:
            dataset = dataset_in(data, self.dataset)
            new["dataset"] = dataclasses.asdict(dataset)
            if dataset.name != self.dataset.name:
                comparable, name = False, f"{name}-{dataset.name}"
        for option, value in (options or {}).items():
            if option not in new["options"]:
                raise UserError(f"there is no option {option!r}; {near(option, list(new['options']))}")
            if new["options"][option] != value:
                name += f"-{option}-{value}".replace("_", "-").replace("/", "-")
        new["options"].update(options or {})
        if not comparable:
            for network in filter(None, (teacher, student)):
                network["published"] = None
            for row in new["rows"]:
                row.update(published=(), average=None)
            new["axis"] = None
        return _validated(new, name, self.name)

    def dump(self) -> str:
        """The table as YAML that `load_table` reads back, however it was made."""
        content = {"name": self.name, **self.model_dump(mode="json", by_alias=True, exclude_defaults=True),
                   "schedule": json.loads(json.dumps(dataclasses.asdict(self.schedule)))}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=130)


def dataset_in(folder: Path, like: Dataset) -> Dataset:
    """The data set in a folder that is laid out as data/<name> is; classes, sizes and batch are those of `like`.

    It keeps the name if the folder's dataset.json says that it is the same set, and is called like the folder otherwise.  A test looks at
    each record of its test set once: its batches, no larger than those of `like`, divide the set.
    Raises UserError if an LMDB is missing or damaged.
    """
    for part in ("train_lmdb", "test_lmdb"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} has no {part}: name a folder that holds train_lmdb and test_lmdb")
    facts = folder / "dataset.json"
    same = facts.is_file() and read_sealed(facts).get("name") == like.name
    known = {field: getattr(like, field) for field in ("train_lmdb", "test_lmdb", "train_mean", "test_mean")}
    paths: dict[str, Any] = {field: str(folder / Path(path).name) for field, path in known.items() if path}
    train, test = (count_records(paths[part]) for part in ("train_lmdb", "test_lmdb"))
    batch = max(size for size in range(1, like.test_batch + 1) if test % size == 0)
    return dataclasses.replace(like, name=like.name if same else folder.resolve().name, train_size=train, test_batch=batch,
                               test_iter=test // batch, **paths)


# ------------------------------------------------------------------------------------------------------------------- reading

def find_table(name: str | Path) -> Table:
    """The table of this name (`table3`), or in this file (a path that ends in .yaml).  Raises UserError if there is none."""
    if str(name).endswith((".yaml", ".yml")):
        return load_table(Path(name))
    for folder in FOLDERS:
        if (folder / f"{name}.yaml").is_file():
            return load_table(folder / f"{name}.yaml")
    raise UserError(f"there is no table {str(name)!r}; {near(name, table_names())}")


def load_table(path: Path) -> Table:
    """Read and check a table's YAML.  Raises UserError naming the file, the field and, for a misspelt one, the nearest known name."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a table is a YAML mapping with title, source, dataset, student and rows")
    return _validated(content, str(content.pop("name", path.stem)), str(path))


def _validated(content: dict[str, Any], name: str, where: str) -> Table:
    if not re.fullmatch(r"\w[\w.-]{0,150}", name):
        raise UserError(f"{where}: name: '{limits.shown(name)}' cannot name a folder; use letters, digits, '-', '_' and '.', not too many")
    limits.require_all(content, where)
    try:
        table = Table.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    table._name = name
    return table


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong: the field as `rows[2].method`, and what to do.  A misspelt field explains one that is missing."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    first = min(error.errors(), key=lambda each: each["type"] not in unknown)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] in unknown:
        return f"{place}: unknown field; {near(first['loc'][-1], _fields_at(first['loc'][:-1]))}"
    text = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{place}: {text}" if place else text


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    """The fields that the part of a table at this place may have."""
    part: Any = {"teacher": Network, "student": Network, "rows": Row, "schedule": Schedule, "options": Options,
                 "dataset": Dataset}[str(place[0])] if place else Table
    if dataclasses.is_dataclass(part):
        return [field.name for field in dataclasses.fields(part)]
    return [field.alias or name for name, field in part.model_fields.items()]
