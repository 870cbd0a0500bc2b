"""A Stage: a run of one solver, or of several that belong together, the weights that go in and the weights that come out.

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
    """What one source gives to a part before its first iteration: each layer by name, as Caffe copies trained layers.

    source     a stage (its weights out), or a .caffemodel or .caffemodel.h5 file
    prefix     put before every layer's name: a trained net becomes "teacher/..." inside another
    layers     only these (names before the prefix), or None for all
    part       of a stage with several parts, whose weights; the first one's by default
    """
    source: Stage | Path
    prefix: str = ""
    layers: tuple[str, ...] | None = None
    part: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """One solver of a stage.

    name         "" for the only one; of several, such as "generator" and "discriminator", a name that can name a folder
    net          TRAIN, and TEST where the solver has a test_iter
    solver       complete but for `net` and `snapshot_prefix`, which the runner fills in
    weights_in   applied in order; layers that none of them names keep their random initialisation
    drop         the weights out are all layers whose names begin with none of these
    """
    name: str
    net: caffe_pb2.NetParameter
    solver: caffe_pb2.SolverParameter
    weights_in: tuple[Weights, ...] = ()
    drop: tuple[str, ...] = ()

    def keeps(self, layer: str) -> bool:
        """Whether the layer of this name is in the weights out."""
        return not layer.startswith(self.drop)


@dataclass(frozen=True, eq=False)
class Stage:
    """What is run in one piece.

    title      for people: "teacher", "hint2", "kd"; not part of what makes stages equal
    parts      its solvers; the first one's net is what the stage is about: tested, drawn, published, and what others start from
    program    what runs them: "solve" is one solver's own loop
    source     the file or module of the method that made it, where that is not the package's
    """
    title: str
    parts: tuple[Part, ...]
    program: str = "solve"
    source: str | None = None

    @classmethod
    def solve(cls, title: str, net: caffe_pb2.NetParameter, solver: caffe_pb2.SolverParameter, weights_in: tuple[Weights, ...] = (),
              drop: tuple[str, ...] = ()) -> Stage:
        """A stage of one part, which its solver trains."""
        return cls(title, (Part("", net, solver, weights_in, drop),))

    def part(self, name: str = "") -> Part:
        """The part of this name, or the first."""
        return next(part for part in self.parts if name in ("", part.name))

    @property
    def net(self) -> caffe_pb2.NetParameter:
        """Of the first part, as are the next ones."""
        return self.parts[0].net

    @property
    def solver(self) -> caffe_pb2.SolverParameter:
        return self.parts[0].solver

    @property
    def weights_in(self) -> tuple[Weights, ...]:
        return self.parts[0].weights_in

    @property
    def drop(self) -> tuple[str, ...]:
        return self.parts[0].drop

    def keeps(self, layer: str) -> bool:
        return self.parts[0].keeps(layer)

    @property
    def iterations(self) -> int:
        """Of its longest part."""
        return max(part.solver.max_iter for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the content, the stages it starts from included; files by their path."""
        parts = [self.program, str(self.source)]
        for part in self.parts:
            parts += [part.name, *part.drop, "", part.net.SerializeToString(deterministic=True).hex(),
                      part.solver.SerializeToString(deterministic=True).hex()]
            for w in part.weights_in:
                source = w.source.digest if isinstance(w.source, Stage) else f"file {w.source}"
                parts += [source, w.prefix, repr(w.layers), w.part]
        return sha256("\n".join(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def sources(self) -> tuple[Stage, ...]:
        """The stages this one needs, in the order of its parts and their weights_in."""
        return tuple(w.source for part in self.parts for w in part.weights_in if isinstance(w.source, Stage))
