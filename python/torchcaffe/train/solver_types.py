"""pycaffe's solver classes, one for each update rule, and the choice among them."""
from __future__ import annotations

from pathlib import Path

from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.train.solver import Solver


class SGDSolver(Solver):
    """Stochastic gradient descent with momentum, whatever `type` the prototxt names."""
    rule = "SGD"


class NesterovSolver(Solver):
    """Nesterov's accelerated gradient."""
    rule = "Nesterov"


class AdaGradSolver(Solver):
    """AdaGrad."""
    rule = "AdaGrad"


class RMSPropSolver(Solver):
    """RMSProp."""
    rule = "RMSProp"


class AdaDeltaSolver(Solver):
    """AdaDelta."""
    rule = "AdaDelta"


class AdamSolver(Solver):
    """Adam."""
    rule = "Adam"


def get_solver(solver_file: str | Path, param: caffe_pb2.SolverParameter | None = None) -> Solver:
    """The solver of the type that the prototxt names; `param` is what it says, where a caller has changed it after reading."""
    param = param or prototxt.read_solver(solver_file)
    kinds = (SGDSolver, NesterovSolver, AdaGradSolver, RMSPropSolver, AdaDeltaSolver, AdamSolver)
    kind = {kind.rule: kind for kind in kinds}.get(param.type, Solver)
    return kind(solver_file, param.type, param)
