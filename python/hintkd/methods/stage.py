"""A Stage: one solver run, the weights that go in and the weights that come out.

Stages form a graph through `weights_in`.  Two stages with the same content are equal, whatever method asked for them, so a runner
that keeps them in a dict runs each once.  Paths, folders and hashes of data are the runner's business.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hintkd.backend import caffe_pb2


@dataclass(frozen=True)
class Weights:
    """What one source gives to a stage before its first iteration: each layer by name, as Caffe copies trained layers.

    source     a stage (its weights out), or a .caffemodel or .caffemodel.h5 file
    prefix     put before every layer's name: a trained net becomes "teacher/..." inside another
    layers     only these (names before the prefix), or None for all
    """
    source: Stage | Path
    prefix: str = ""
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Stage:
    """One solver run.

    title        for people: "teacher", "hint2", "kd"; not part of what makes stages equal
    net          TRAIN, and TEST where the solver has a test_iter
    solver       complete but for `net` and `snapshot_prefix`, which the runner fills in
    weights_in   applied in order; layers that none of them names keep their random initialisation
    drop         the weights out are all layers whose names begin with none of these
    program      what runs the stage: "solve" is the solver's own loop
    """
    title: str
    net: caffe_pb2.NetParameter
    solver: caffe_pb2.SolverParameter
    weights_in: tuple[Weights, ...] = ()
    drop: tuple[str, ...] = ()
    program: str = "solve"

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the content, the stages it starts from included; files by their path."""
        parts = [self.program, *self.drop, "", self.net.SerializeToString(deterministic=True).hex(),
                 self.solver.SerializeToString(deterministic=True).hex()]
        for w in self.weights_in:
            source = w.source.digest if isinstance(w.source, Stage) else f"file {w.source}"
            parts += [source, w.prefix, repr(w.layers)]
        return sha256("\n".join(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def keeps(self, layer: str) -> bool:
        """Whether the layer of this name is in the weights out."""
        return not layer.startswith(self.drop)

    @property
    def sources(self) -> tuple[Stage, ...]:
        """The stages this one needs, in the order of weights_in."""
        return tuple(w.source for w in self.weights_in if isinstance(w.source, Stage))
