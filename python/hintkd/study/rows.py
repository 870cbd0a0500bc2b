"""What a table is made of: its rows, its teachers and students, its data set, each as YAML has it and checked when it is read."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from hintkd.backend import count_records
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Dataset, Network
from hintkd.files import read_sealed
from hintkd.nets.networks import NETWORKS
from hintkd.study.fields import built, near, place_of

TEACHER, ORIGINAL = "teacher", "original"                    # rows of every table: the teacher (one net) and the student without one


def dataset_of(given: Any, place: str = "dataset") -> Dataset:
    """A known data set by its name, or one by its fields."""
    if isinstance(given, Dataset):
        return given
    if isinstance(given, str):
        if given not in DATASETS:
            raise UserError(f"{place}: {given!r} is not a data set; {near(given, list(DATASETS))}")
        return DATASETS[given]
    return built(Dataset, given, place)


def _dataset_name(dataset: Dataset) -> Any:
    return next((name for name, known in DATASETS.items() if known == dataset), dataclasses.asdict(dataset))


DataSet = Annotated[Dataset, BeforeValidator(dataset_of), PlainSerializer(_dataset_name)]            # a known one's name, or all its fields
Number = Annotated[float, Field(allow_inf_nan=False)]


class Learner(BaseModel):
    """A teacher or student: the network, by its name in NETWORKS and what that takes, such as depth and widths.

    `published` is what the paper reports for it when it is trained on the labels alone.
    """
    model_config = ConfigDict(extra="allow", frozen=True)

    net: str = "resnet"
    published: Number | None = None
    dataset: DataSet | None = None                           # a teacher's own training set
    weights: Path | None = None                              # a trained teacher from elsewhere, and its net if that is not this one
    prototxt: Path | None = None
    method: str = ORIGINAL                                   # that trains the teacher
    teacher: Learner | None = None                           # the teacher's own, for a method that needs one

    def network(self, place: str) -> Network:
        """Raises UserError, naming the field, on what does not make a network."""
        if self.net not in NETWORKS:
            raise UserError(f"{place}.net: {self.net!r} is not a network; {near(self.net, list(NETWORKS))}")
        try:
            return built(NETWORKS[self.net], self.model_extra or {}, place)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(place) else f"{place}: {error}") from None


class Row(BaseModel):
    """A method, what is set otherwise than for the table, and the published values in the table's metric.

    name         of its results; the method's where it has none
    published    one value per net, of the table's last column where it has columns
    average      as it was printed, or all that was printed
    columns      by column, one value per net or a single one; in YAML `published` may be such a mapping
    """
    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    name: str = ""
    set: dict[str, Any] = {}
    published: tuple[Number, ...] = ()
    average: Number | None = None
    columns: dict[str, Number | tuple[Number, ...]] = {}

    @model_validator(mode="before")
    @classmethod
    def _as_before(cls, given: Any) -> Any:
        """tau and lambda once stood beside the method."""
        if not isinstance(given, dict):
            return given
        kept = {name: value for name, value in given.items() if name not in ("tau", "lambda")}
        moved = {name: given[name] for name in ("tau", "lambda") if given.get(name) is not None}
        return {**kept, "set": {**moved, **(given.get("set") or {})}} if moved else kept

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or self.method

    def printed(self, column: str) -> tuple[float, ...]:
        """What was printed in one column."""
        value = self.columns.get(column, ())
        return value if isinstance(value, tuple) else (value,)


def learner_of(given: Any, place: str) -> Learner:
    try:
        return Learner.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{place_of((place, *first['loc']))}: {first['msg']}") from None


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
