"""Experiments of the 2019 paper as its tables make them, of a student and a teacher that a test chooses."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from hintkd.experiment import DATASETS, Dataset, Experiment, Network, Trained
from hintkd.methods.hint_2019 import Options, Schedule
from hintkd.methods.papers import paper
from hintkd.nets.resnet import ResNet

METHODS = {name: method for name, method in paper("hint_2019").methods.items() if not method.is_shared}


SMALL, BIG, SCHEDULE, OPTIONS = ResNet(8), ResNet(14), Schedule(), Options()


def experiment(method: str = "kd", *, dataset: Dataset = DATASETS["cifar10"], student: Network = SMALL,
               teacher: Network | Experiment | Trained | None = BIG, teacher_dataset: Dataset | None = None,
               schedule: Schedule = SCHEDULE, options: Options = OPTIONS, **more: Any) -> Experiment:
    """A student of ResNet-8, taught by one of ResNet-14 that was trained on the labels; `more` are fields of an Experiment."""
    methods = paper("hint_2019").methods
    shared: dict[str, Any] = {"options": options, **{name: value for name, value in more.items() if name not in ("net", "table_seed")}}
    if teacher is not None and not isinstance(teacher, (Experiment, Trained)):
        teacher = Experiment(methods["original"], teacher_dataset or dataset, teacher, generation=1, pupil=student,
                             schedule=replace(schedule, iterations=schedule.teacher_iterations), **shared)
    return Experiment(methods[method], dataset, student, teacher, schedule=schedule, options=options, **more)
