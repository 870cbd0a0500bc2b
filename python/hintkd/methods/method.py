"""What a method is: a function from an experiment to its stages, in order, the last of which trains what is measured.

    @method
    def kd(x):
        \"\"\"KD from random weights.\"\"\"
        return [kd_stage(x)]

A method says itself what it needs and how it is drawn; its name is the function's.  A paper's module, or a file of one's own, holds methods
and what they share (papers.py).  What a stage is stands in stage.py.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

from hintkd.errors import UserError
from hintkd.experiment import Experiment, Trained
from hintkd.methods.stage import Stage, Weights
from hintkd.nets.surgery import TEACHER

Train = Callable[[Experiment], list[Stage]]


class Line(NamedTuple):
    """How a method is drawn: its colour and line style in curves and bars, and the line style of its hint losses."""
    colour: str
    style: str = "-"
    hints: str = "-"


class Choice(NamedTuple):
    """A point that a paper leaves open and that has one answer here: what the paper says about it, and what is done."""
    point: str
    paper: str
    done: str


@dataclass(frozen=True)
class Method:
    """A published way to train, or one of one's own.

    name             as tables call it
    train            makes the stages
    needs_teacher    whether there must be one
    line             how it is drawn; None leaves that to the figures
    is_shared        there is one for all nets of a table, as of a teacher
    source           the file or module that it comes from, where that is not the package's: its code is part of its stages' keys
    """
    name: str
    train: Train
    needs_teacher: bool = True
    line: Line | None = None
    is_shared: bool = False
    source: str | None = None

    @property
    def about(self) -> str:
        """Its docstring as one line."""
        return " ".join((self.train.__doc__ or "").split())

    def __call__(self, x: Experiment) -> list[Stage]:
        """The stages of an experiment.  Raises UserError on networks that do not fit together, and without a teacher that is needed."""
        if self.needs_teacher and x.teacher is None:
            raise UserError(f"{x.table}: {x.name} needs a teacher; name its depth or give its prototxt and caffemodel")
        stages = list(self.train(x))
        return signed(stages, self.source) if self.source else stages


@overload
def method(train: Train) -> Method: ...
@overload
def method(*, needs_teacher: bool = True, line: Line | None = None, is_shared: bool = False) -> Callable[[Train], Method]: ...


def method(train: Train | None = None, *, needs_teacher: bool = True, line: Line | None = None,
           is_shared: bool = False) -> Method | Callable[[Train], Method]:
    """Make a function from an experiment to its stages a Method, which is called as the function is, with - for _."""
    def made(function: Train) -> Method:
        return Method(function.__name__.replace("_", "-"), function, needs_teacher, line, is_shared)
    return made(train) if train else made


def signed(stages: list[Stage], source: str) -> list[Stage]:
    """The stages with the file or module that they come from, each starting from the others as they are here."""
    made: dict[Stage, Stage] = {}
    for stage in stages:
        parts = tuple(replace(part, weights_in=tuple(
            replace(w, source=made.get(w.source, w.source)) if isinstance(w.source, Stage) else w for w in part.weights_in))
            for part in stage.parts)
        made[stage] = replace(stage, parts=parts, source=source)
    return [made[stage] for stage in stages]


def stages_of(x: Experiment) -> list[Stage]:
    """The stages of an experiment; the weights of the last one are what is measured.  Raises UserError as the method does."""
    assert isinstance(x.method, Method), x.method
    return x.method(x)


def teacher_stages(x: Experiment) -> list[Stage]:
    """The stages that train the experiment's teacher.  Raises UserError where there is none to be trained."""
    if not isinstance(x.teacher, Experiment):
        raise UserError(f"{x.table}: there is no teacher to train; name its depth")
    return stages_of(x.teacher)


def teacher_weights(x: Experiment) -> Weights:
    """The trained teacher's layers under "teacher/": the result of its own stages, or those of a file."""
    return Weights(x.teacher.caffemodel if isinstance(x.teacher, Trained) else teacher_stages(x)[-1], prefix=TEACHER)
