"""Writes the nets and solvers of an experiment as prototxt files that any Caffe trains from the repository's root.

    prototxt/<data set>/<nets>/<row>/<k>-<stage>.prototxt         the net of the k-th stage of a row, which has its method's name or its own
    solvers/<data set>/<nets>/<row>/<k>-<stage>.prototxt          its solver; snapshots are written beside it

<nets> is "<teacher>-to-<student>", or the one network's name where there is no other; widths other than 16, 32, 64 are named.
Where net k above the first has a solver of its own, which differs in the seed, its name ends in "-net<k>".
What a stage is stands in stage.py.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hintkd.backend import write_text
from hintkd.experiment import Experiment
from hintkd.files import write_file
from hintkd.methods.method import stages_of
from hintkd.methods.stage import Part, Stage, Weights
from hintkd.nets.surgery import TEACHER

_HEAD = "# Written by `hintkd generate`; change the generator, not this file.\n"
_COMMAND = "# From the repository's root, with PYTHONPATH=python where hintkd is not installed:  caffe train --solver={}{}\n"


@dataclass(frozen=True)
class _Place:
    """Where a stage is written, without folder and suffix; `net` is above 1 where the stage is that net's own."""
    path: str
    net: int = 1

    def of(self, part: Part) -> str:
        """Of one of several parts."""
        return "-".join(filter(None, [self.path, part.name]))

    def solver(self, part: Part) -> str:
        """The solver's path without suffix, which is also Caffe's default for its snapshots."""
        return f"solvers/{self.of(part)}{f'-net{self.net}' if self.net > 1 else ''}"


def generate(x: Experiment, root: Path = Path()) -> list[Path]:
    """Write every stage of an experiment as generate_all does."""
    return generate_all([x], root)


def generate_all(experiments: Iterable[Experiment], root: Path = Path()) -> list[Path]:
    """Write every stage of the experiments, the teachers' included, under `root`; returns the files, nets and solvers in turn.

    A file with the right content is left alone, and every other one is replaced at once or not at all.  Nothing is written before all of
    the experiments have their stages.
    """
    texts = {path: text for x in experiments for path, text in _texts(x).items()}
    return [_written(root / path, text) for path, text in texts.items()]


def _texts(x: Experiment) -> dict[str, str]:
    """Path under the root and content of every file of an experiment."""
    places, texts = _places(x), dict[str, str]()
    for stage, place in places.items():
        for part in stage.parts:
            message = type(part.solver)()
            message.CopyFrom(part.solver)
            message.net, message.snapshot_prefix = f"prototxt/{place.of(part)}.prototxt", place.solver(part)
            solver = message.snapshot_prefix + ".prototxt"
            head = _HEAD + _COMMAND.format(solver, " --weights=FILE,..." if part.weights_in else "")
            for w in part.weights_in:
                renamed = f", with \"{w.prefix}\" put before every layer's name" if w.prefix else ""
                head += f"# Weights: {_file(w, places)}{renamed}\n"
            texts |= {message.net: _HEAD + write_text(part.net), solver: head + write_text(message)}
    return texts


def _places(x: Experiment) -> dict[Stage, _Place]:
    """Where each stage is written; the teacher's, where it is trained here, first."""
    stages, of_net_1 = stages_of(x), stages_of(replace(x, net=1))
    taught = x.teacher if isinstance(x.teacher, Experiment) else None
    trained = stages_of(taught) if taught else []
    teacher = taught.student.title if taught else "own-teacher"
    uses_teacher = any(w.prefix == TEACHER for stage in stages for part in stage.parts for w in part.weights_in)
    nets = f"{teacher}-to-{x.student.title}" if uses_teacher else x.student.title
    places = {}
    if taught and (uses_teacher or trained == stages):
        places = {stage: _Place(f"{taught.dataset.name}/{teacher}/teacher/{k}-{stage.title}") for k, stage in enumerate(trained, start=1)}
    for k, stage in enumerate(stages, start=1):
        places.setdefault(stage, _Place(f"{x.dataset.name}/{nets}/{x.name}/{k}-{stage.title}", 1 if stage in of_net_1 else x.net))
    return places


def _file(weights: Weights, places: dict[Stage, _Place]) -> str:
    """The file that holds these weights when the stages before have run."""
    source = weights.source
    if not isinstance(source, Stage):
        return str(source)
    (part,) = (part for part in source.parts if part.name == weights.part)
    return f"{places[source].solver(part)}_iter_{part.solver.max_iter}.caffemodel"


def _written(path: Path, text: str) -> Path:
    """The file with this text, left alone where it has it."""
    if not path.exists() or path.read_text() != text:
        write_file(path, text)
    return path
