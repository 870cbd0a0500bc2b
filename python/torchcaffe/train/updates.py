"""Update rules: from gradients to what is subtracted from the parameters (Caffe: src/caffe/solvers/*.cpp).

Each rule is a function of lists of tensors, all parameters of one learning rate at a time.  It changes the histories in place and
returns the update.  The Updater sorts a solver's parameters into such groups, and subtracts.  A rate is a number, or a tensor of one
where it has to lie in device memory (capture.py).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import copysign, inf

import numpy as np
import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.graph.build import Learnable
from torchcaffe.proto import caffe_pb2

Tensors = list[Tensor]
Param = caffe_pb2.SolverParameter
Rate = float | Tensor
LARGEST = float(np.finfo(np.float32).max)
# (gradients, histories, rate, param) -> update; histories is one list of tensors, or two
Rule = Callable[[Tensors, Sequence[Tensors], Rate, Param], Tensors]


def sgd(gradients: Tensors, histories: Sequence[Tensors], rate: Rate, p: Param) -> Tensors:
    """h = m h + r g; step h.  The rate is inside the history, so torch's SGD differs after a rate drop."""
    history = histories[0]
    torch._foreach_mul_(history, p.momentum)
    if isinstance(rate, Tensor):
        torch._foreach_add_(history, torch._foreach_mul(gradients, rate))
    else:
        torch._foreach_add_(history, gradients, alpha=rate)
    return history


def nesterov(gradients: Tensors, histories: Sequence[Tensors], rate: Rate, p: Param) -> Tensors:
    """h' = m h + r g; step (1 + m) h' - m h."""
    step = list(torch._foreach_mul(histories[0], -p.momentum))
    history = sgd(gradients, histories, rate, p)
    torch._foreach_add_(step, history, alpha=1 + p.momentum)
    return step


def adagrad(gradients: Tensors, histories: Sequence[Tensors], rate: Rate, p: Param) -> Tensors:
    """h += g^2; step r g / (sqrt(h) + delta)."""
    torch._foreach_addcmul_(histories[0], gradients, gradients)
    return _scaled(gradients, histories[0], rate, p.delta)


def rmsprop(gradients: Tensors, histories: Sequence[Tensors], rate: Rate, p: Param) -> Tensors:
    """h = d h + (1 - d) g^2; step r g / (sqrt(h) + delta), d = rms_decay."""
    torch._foreach_mul_(histories[0], p.rms_decay)
    torch._foreach_addcmul_(histories[0], gradients, gradients, value=1 - p.rms_decay)
    return _scaled(gradients, histories[0], rate, p.delta)


def adadelta(gradients: Tensors, histories: Sequence[Tensors], rate: Rate, p: Param) -> Tensors:
    """h = m h + (1 - m) g^2; u = g sqrt((h2 + delta) / (h + delta)); h2 = m h2 + (1 - m) u^2; step r u."""
    squares, updates = histories
    torch._foreach_mul_(squares, p.momentum)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - p.momentum)
    ratio = torch._foreach_div(torch._foreach_add(updates, p.delta), torch._foreach_add(squares, p.delta))
    step = torch._foreach_mul(gradients, torch._foreach_sqrt(ratio))
    torch._foreach_mul_(updates, p.momentum)
    torch._foreach_addcmul_(updates, step, step, value=1 - p.momentum)
    return list(torch._foreach_mul(step, rate))


def adam(gradients: Tensors, histories: Sequence[Tensors], rate: Rate, p: Param) -> Tensors:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; step r m / (sqrt(v) + delta), with the rate that adam_rate() makes of r."""
    means, squares = histories
    torch._foreach_mul_(means, p.momentum)
    torch._foreach_add_(means, gradients, alpha=1 - p.momentum)
    torch._foreach_mul_(squares, p.momentum2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - p.momentum2)
    return _scaled(means, squares, rate, p.delta)


@np.errstate(all="ignore")
def adam_rate(rate: float, iteration: int, p: Param) -> float:
    """r sqrt(1 - b2^t) / (1 - b1^t), t = iteration + 1.  A momentum of 1 makes it infinite."""
    t = iteration + 1
    return float(rate * (np.sqrt(1 - np.float64(p.momentum2)**t) / (1 - np.float64(p.momentum)**t)))


def _scaled(values: Tensors, squares: Tensors, rate: Rate, delta: float) -> Tensors:
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

    The norm stays on the device: no host waits for it.  Squares are added in float64, one after the other as they are.
    """
    if limit <= 0 or not gradients:
        return gradients
    total = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(gradients, 2, dtype=torch.float64))))
    return list(torch._foreach_mul(gradients, torch.where(total > limit, limit / total, torch.ones_like(total)).to(gradients[0].dtype)))


def single(value: float) -> float:
    """`value`, infinite where it is beyond float32, which is how Caffe keeps it; torch refuses such numbers."""
    return value if not abs(value) > LARGEST else copysign(inf, value)


@dataclass
class Group:
    """Parameters that share a rate and a weight decay: their places among the learnable ones, themselves and their histories."""
    members: list[int]
    lr_mult: float
    decay: float
    weights: Tensors
    histories: list[Tensors]
    rate: Rate


class Updater:
    """The update of all parameters of a solver.

    histories: one list of tensors, or two, with a tensor for each learnable parameter, zeros at first
    """

    def __init__(self, rule: str, param: Param, learnable: list[Learnable]):
        self.rule, self.param, self.learnable = rule, param, learnable
        self.histories = [[torch.zeros_like(item.blob.data_slot.value()) for item in learnable] for _ in range(HISTORIES.get(rule, 1))]
        self.moving = self._moving()
        self.groups: list[Group] = []
        self.rates: dict[tuple[float, float], Tensor] = {}  # in device memory, by (lr_mult, decay_mult), for a graph that has them in it

    def check(self, history: Sequence[np.ndarray], source: str) -> None:
        """Raise CaffeError if the histories of the solver state `source` are another net's or solver's."""
        targets = [(item.layer, tensor) for slot in self.histories for item, tensor in zip(self.learnable, slot, strict=True)]
        if len(history) != len(targets):
            raise CaffeError(f"{source}: {len(history)} history blobs, but {len(targets)} are needed; it belongs to another net or solver")
        for (name, target), array in zip(targets, history, strict=True):
            if tuple(target.shape) != array.shape and target.numel() != array.size:
                raise CaffeError(f"{source}: the history of layer '{name}' has shape {array.shape}, but {tuple(target.shape)} is needed")

    def restore(self, history: Sequence[np.ndarray]) -> None:
        """Take histories that check() has passed; what rested may move now."""
        for target, array in zip([tensor for slot in self.histories for tensor in slot], history, strict=True):
            target.copy_(torch.from_numpy(array).reshape(target.shape))
        self.moving = self._moving()

    def _moving(self) -> dict[tuple[float, float], list[int]]:
        """Parameters by (lr_mult, decay_mult), without those that no update can change."""
        moving: dict[tuple[float, float], list[int]] = {}
        for i, item in enumerate(self.learnable):
            if self.rule not in MOVED_BY_RATE_ONLY or item.lr_mult or self.histories[0][i].any():
                moving.setdefault((item.lr_mult, item.decay_mult), []).append(i)
        return moving

    @property
    def at_rest(self) -> set[int]:
        """The places of the parameters that no update can change."""
        return set(range(len(self.learnable))) - {i for members in self.moving.values() for i in members}

    def begin(self, on_device: bool = False) -> None:
        """Take the parameters as they are now, with what was written to their arrays; with `on_device`, keep rates in device memory."""
        self.groups = []
        for key, members in self.moving.items():
            lr_mult, decay_mult = key
            weights = [self.learnable[i].blob.data_slot.value() for i in members]
            if on_device and key not in self.rates:
                self.rates[key] = weights[0].new_zeros(())
            self.groups.append(Group(members, lr_mult, single(self.param.weight_decay * decay_mult), weights,
                                     [[history[i] for i in members] for history in self.histories],
                                     self.rates[key] if on_device else 0.0))

    def set_rate(self, rate: float, iteration: int) -> None:
        """The learning rate of the next apply()."""
        if self.rule == "Adam":
            rate = adam_rate(rate, iteration, self.param)
        for group in self.groups:
            value = single(rate * group.lr_mult)
            if isinstance(group.rate, Tensor):
                group.rate.fill_(value)
            else:
                group.rate = value

    def apply(self, gradients: list[Tensor | None]) -> dict[int, Tensor]:
        """Change the parameters; returns by how much, {place: what was subtracted}.  `gradients` are sums over iter_size passes."""
        present = [i for i, g in enumerate(gradients) if g is not None]
        known = clip([g for g in gradients if g is not None], self.param.clip_gradients)
        if self.param.iter_size != 1 and known:
            known = list(torch._foreach_mul(known, 1 / self.param.iter_size))
        gradient = dict(zip(present, known, strict=True))
        changes: dict[int, Tensor] = {}
        for group in self.groups:
            chosen = [gradient[i] if i in gradient else torch.zeros_like(w) for i, w in zip(group.members, group.weights, strict=True)]
            chosen = regularise(chosen, group.weights, group.decay, self.param.regularization_type)
            change = RULES[self.rule](chosen, group.histories, group.rate, self.param)
            torch._foreach_sub_(group.weights, change)
            changes.update(zip(group.members, change, strict=True))
        return changes
