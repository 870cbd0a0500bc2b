"""Learning rate policies (Caffe: SGDSolver::GetLearningRate in sgd_solver.cpp)."""
from __future__ import annotations

from math import exp

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid")


def check_policy(p: caffe_pb2.SolverParameter) -> None:
    """Raise CaffeError unless lr_policy is known and has what it needs."""
    if p.lr_policy not in POLICIES:
        raise CaffeError(f"lr_policy '{p.lr_policy}' is not one of {', '.join(POLICIES)}")
    if p.lr_policy == "step" and p.stepsize <= 0:
        raise CaffeError("lr_policy 'step' needs a stepsize above 0")


def learning_rate(p: caffe_pb2.SolverParameter, iteration: int, current_step: int) -> tuple[float, int]:
    """(rate, current_step) at `iteration`.

    multistep's current_step moves at most one step per call, so it has to be carried from call to call, through
    snapshots too; for step it is derived from the iteration.
    """
    rate = 1.0
    match p.lr_policy:
        case "step":
            current_step = iteration // p.stepsize
            rate = p.gamma**current_step
        case "exp":
            rate = p.gamma**iteration
        case "inv":
            rate = (1 + p.gamma * iteration) ** -p.power
        case "multistep":
            if current_step < len(p.stepvalue) and iteration >= p.stepvalue[current_step]:
                current_step += 1
            rate = p.gamma**current_step
        case "poly":
            rate = (1 - iteration / p.max_iter) ** p.power
        case "sigmoid":
            rate = 1 / (1 + exp(-p.gamma * (iteration - p.stepsize)))
    return p.base_lr * rate, current_step
