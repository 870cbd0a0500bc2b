"""Learning rate policies (Caffe: SGDSolver::GetLearningRate in sgd_solver.cpp)."""
from __future__ import annotations

from math import exp

import numpy as np

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

LARGEST_EXPONENT = 709.0                                # of a float64
POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid")
USING_GAMMA = ("step", "exp", "inv", "multistep", "sigmoid")


def check_policy(p: caffe_pb2.SolverParameter) -> None:
    """Raise CaffeError unless lr_policy is known and has what it needs."""
    if p.lr_policy not in POLICIES:
        raise CaffeError(f"lr_policy '{p.lr_policy}' is not one of {', '.join(POLICIES)}")
    if p.lr_policy in ("step", "sigmoid") and p.stepsize <= 0:
        raise CaffeError(f"lr_policy '{p.lr_policy}' needs a stepsize above 0")
    if p.lr_policy in USING_GAMMA and not p.gamma >= 0:
        raise CaffeError(f"lr_policy '{p.lr_policy}' needs a gamma of at least 0, not {p.gamma:g}")


@np.errstate(all="ignore")
def learning_rate(p: caffe_pb2.SolverParameter, iteration: int, current_step: int) -> tuple[float, int]:
    """(rate, current_step) at `iteration`.

    multistep's current_step moves at most one step per call, so it has to be carried from call to call, through
    snapshots too; for step it is derived from the iteration.  What C's arithmetic makes infinite or NaN is so here (poly behind
    max_iter), where Python's floats would raise or turn complex.
    """
    rate = 1.0
    gamma, power = np.float64(p.gamma), np.float64(p.power)
    match p.lr_policy:
        case "step":
            current_step = iteration // p.stepsize
            rate = gamma**current_step
        case "exp":
            rate = gamma**iteration
        case "inv":
            rate = (1 + gamma * iteration) ** -power
        case "multistep":
            if current_step < len(p.stepvalue) and iteration >= p.stepvalue[current_step]:
                current_step += 1
            rate = gamma**current_step
        case "poly":
            rate = (1 - iteration / np.float64(p.max_iter)) ** power
        case "sigmoid":
            rate = 1 / (1 + exp(min(-p.gamma * (iteration - p.stepsize), LARGEST_EXPONENT)))
    return float(p.base_lr * rate), current_step
