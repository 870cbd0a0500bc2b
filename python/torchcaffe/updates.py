"""Update rules: from gradients to what is subtracted from the parameters (Caffe: src/caffe/solvers/*.cpp).

Each rule is a function of lists of tensors, all parameters of one learning rate at a time.  It changes the histories in place and
returns the update, which the solver subtracts.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import copysign, inf

import numpy as np
import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

Tensors = list[Tensor]
Param = caffe_pb2.SolverParameter
LARGEST = float(np.finfo(np.float32).max)
# (gradients, histories, rate, iteration, param) -> update; histories is one list of tensors, or two
Rule = Callable[[Tensors, Sequence[Tensors], float, int, Param], Tensors]


def sgd(gradients: Tensors, histories: Sequence[Tensors], rate: float, iteration: int, p: Param) -> Tensors:
    """h = m h + r g; step h.  The rate is inside the history, so torch's SGD differs after a rate drop."""
    history = histories[0]
    torch._foreach_mul_(history, p.momentum)
    torch._foreach_add_(history, gradients, alpha=rate)
    return history


def nesterov(gradients: Tensors, histories: Sequence[Tensors], rate: float, iteration: int, p: Param) -> Tensors:
    """h' = m h + r g; step (1 + m) h' - m h."""
    step = list(torch._foreach_mul(histories[0], -p.momentum))
    history = sgd(gradients, histories, rate, iteration, p)
    torch._foreach_add_(step, history, alpha=1 + p.momentum)
    return step


def adagrad(gradients: Tensors, histories: Sequence[Tensors], rate: float, iteration: int, p: Param) -> Tensors:
    """h += g^2; step r g / (sqrt(h) + delta)."""
    torch._foreach_addcmul_(histories[0], gradients, gradients)
    return _scaled(gradients, histories[0], rate, p.delta)


def rmsprop(gradients: Tensors, histories: Sequence[Tensors], rate: float, iteration: int, p: Param) -> Tensors:
    """h = d h + (1 - d) g^2; step r g / (sqrt(h) + delta), d = rms_decay."""
    torch._foreach_mul_(histories[0], p.rms_decay)
    torch._foreach_addcmul_(histories[0], gradients, gradients, value=1 - p.rms_decay)
    return _scaled(gradients, histories[0], rate, p.delta)


def adadelta(gradients: Tensors, histories: Sequence[Tensors], rate: float, iteration: int, p: Param) -> Tensors:
    """h = m h + (1 - m) g^2; u = g sqrt((h2 + delta) / (h + delta)); h2 = m h2 + (1 - m) u^2; step r u."""
    squares, updates = histories
    torch._foreach_mul_(squares, p.momentum)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - p.momentum)
    ratio = torch._foreach_div(torch._foreach_add(updates, p.delta), torch._foreach_add(squares, p.delta))
    step = torch._foreach_mul(gradients, torch._foreach_sqrt(ratio))
    torch._foreach_mul_(updates, p.momentum)
    torch._foreach_addcmul_(updates, step, step, value=1 - p.momentum)
    return list(torch._foreach_mul(step, rate))


def adam(gradients: Tensors, histories: Sequence[Tensors], rate: float, iteration: int, p: Param) -> Tensors:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; step r sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + delta), t = iteration + 1."""
    means, squares = histories
    torch._foreach_mul_(means, p.momentum)
    torch._foreach_add_(means, gradients, alpha=1 - p.momentum)
    torch._foreach_mul_(squares, p.momentum2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - p.momentum2)
    t = iteration + 1
    with np.errstate(all="ignore"):                       # a momentum of 1 gives infinite steps, not an exception
        correction = np.sqrt(1 - np.float64(p.momentum2)**t) / (1 - np.float64(p.momentum)**t)
        step = single(rate * correction)
    return _scaled(means, squares, step, p.delta)


def single(value: float) -> float:
    """`value`, infinite where it is beyond float32, which is how Caffe keeps it; torch refuses such numbers."""
    return value if not abs(value) > LARGEST else copysign(inf, value)


def _scaled(values: Tensors, squares: Tensors, rate: float, delta: float) -> Tensors:
    """rate * values / (sqrt(squares) + delta), as new tensors."""
    root = torch._foreach_sqrt(squares)
    torch._foreach_add_(root, delta)
    step = torch._foreach_div(values, root)
    torch._foreach_mul_(step, rate)
    return list(step)


RULES: dict[str, Rule] = {"SGD": sgd, "Nesterov": nesterov, "AdaGrad": adagrad, "RMSProp": rmsprop, "AdaDelta": adadelta, "Adam": adam}
HISTORIES = {"AdaDelta": 2, "Adam": 2}                # one for all others
MOVED_BY_RATE_ONLY = ("SGD", "Nesterov")              # a parameter of rate 0 leaves no trace in the history


def check_rule(p: Param, name: str) -> None:
    """Raise CaffeError for a solver type there is no rule for, and for settings Caffe refuses with it."""
    if name not in RULES:
        raise CaffeError(f"solver type '{name}' is not registered; there are {', '.join(RULES)}")
    if name in ("AdaGrad", "RMSProp") and p.momentum:
        raise CaffeError(f"momentum cannot be used with {name}; leave it away")
    if p.regularization_type not in ("L1", "L2"):
        raise CaffeError(f"regularization_type '{p.regularization_type}' is not L1 or L2")


def regularise(gradients: Tensors, weights: Tensors, decay: float, kind: str) -> Tensors:
    """Gradients with the weight decay's part: decay w for L2, decay sign(w) for L1.  New tensors: autograd's may share memory."""
    if not decay or not gradients:
        return gradients
    return list(torch._foreach_add(gradients, weights if kind == "L2" else torch._foreach_sign(weights), alpha=decay))


def clip(gradients: Tensors, limit: float) -> Tensors:
    """Gradients scaled so that their global L2 norm is at most `limit`; a limit of 0 or below does nothing.

    The norm stays on the device: no host waits for it.
    """
    if limit <= 0 or not gradients:
        return gradients
    total = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(gradients))))
    return list(torch._foreach_mul(gradients, torch.where(total > limit, limit / total, torch.ones_like(total))))
