"""Writes the nets and solvers of an experiment as prototxt files that any Caffe trains from the repository's root.

    prototxt/<data set>/<nets>/<method>/<k>-<stage>.prototxt         the net of the k-th stage
    solvers/<data set>/<nets>/<method>/<k>-<stage>.prototxt          its solver; snapshots are written beside it

<nets> is "<teacher>-to-<student>", or the one network's name where there is no other; widths other than 16, 32, 64 are named.
Where net k above the first has a solver of its own, which differs in the seed, its name ends in "-net<k>".
What a stage is stands in stage.py.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hintkd.backend import write_text
from hintkd.experiment import Experiment
from hintkd.methods.hint_2019 import stages_of, teacher_stage
from hintkd.methods.stage import Stage, Weights
from hintkd.nets.surgery import TEACHER

_HEAD = "# Written by `hintkd generate`; change the generator, not this file.\n"
_COMMAND = "# From the repository's root, with PYTHONPATH=python where hintkd is not installed:  caffe train --solver={}{}\n"


def generate(x: Experiment, root: Path = Path()) -> list[Path]:
    """Write every stage of an experiment as generate_all does."""
    return generate_all([x], root)


def generate_all(experiments: Iterable[Experiment], root: Path = Path()) -> list[Path]:
    """Write every stage of the experiments, the teachers' included, under `root`; returns the files, nets and solvers in turn.

    A file with the right content is left alone, and every other one is replaced at once or not at all.  Nothing is written before all of
    the experiments have their stages.
    """
    texts = {path: text for x in experiments for path, text in _texts(x).items()}
    return [_write(root / path, text) for path, text in texts.items()]


def _texts(x: Experiment) -> dict[str, str]:
    """Path under the root and content of every file of an experiment."""
    places, texts = _places(x), dict[str, str]()
    for stage, place in places.items():
        message = type(stage.solver)()
        message.CopyFrom(stage.solver)
        message.net, message.snapshot_prefix = f"prototxt/{place}.prototxt", _prefix(x, stage, place)
        solver = message.snapshot_prefix + ".prototxt"
        weights = [(w, _file(x, w, places)) for w in stage.weights_in]
        head = _HEAD + _COMMAND.format(solver, " --weights=FILE,..." if weights else "")
        for w, file in weights:
            head += f"# Weights: {file}" + (f", with \"{w.prefix}\" put before every layer's name" if w.prefix else "") + "\n"
        texts |= {message.net: _HEAD + write_text(stage.net), solver: head + write_text(message)}
    return texts


def _places(x: Experiment) -> dict[Stage, str]:
    """Where each stage is written, without folder and suffix; the teacher, where it is trained here, first."""
    stages = stages_of(x)
    trained = teacher_stage(x) if x.teacher and not x.external_teacher else None
    teacher = x.teacher.title if x.teacher else "own-teacher"
    taught = any(w.prefix == TEACHER for stage in stages for w in stage.weights_in)
    nets = f"{teacher}-to-{x.student.title}" if taught else x.student.title
    places = {trained: f"{x.dataset.name}/{teacher}/teacher/1-teacher"} if trained and (taught or trained in stages) else {}
    for k, stage in enumerate(stages, start=1):
        places.setdefault(stage, f"{x.dataset.name}/{nets}/{x.method}/{k}-{stage.title}")
    return places


def _prefix(x: Experiment, stage: Stage, place: str) -> str:
    """The solver's path without suffix, which is also Caffe's default for its snapshots."""
    own = x.net > 1 and stage.solver.random_seed not in (x.teacher_seed, x.stage1_seed)
    return f"solvers/{place}{f'-net{x.net}' if own else ''}"


def _file(x: Experiment, weights: Weights, places: dict[Stage, str]) -> str:
    """The file that holds these weights when the stages before have run."""
    source = weights.source
    return f"{_prefix(x, source, places[source])}_iter_{source.solver.max_iter}.caffemodel" if isinstance(source, Stage) else str(source)


def _write(path: Path, text: str) -> Path:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    return path
