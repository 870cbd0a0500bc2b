"""Recurrent layers: RNN, LSTM, and the LSTMUnit that an LSTM repeats.

Bottoms are T time steps of N independent streams: x (T, N, ...), and cont (T, N), which is 0 where a new sequence begins.  Then may come
a static input (N, ...), added at each step, and with expose_hidden the initial states (1, N, D); the final ones are tops then.
Otherwise a pass begins with the states in which the one before it ended, zeros at first.  No gradient goes through states
from pass to pass, nor between exposed states and the rest of the net.  Caffe: recurrent_layer.cpp, rnn_layer.cpp, lstm_layer.cpp.
"""
from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.layers.base import Count, Layer, Shape, layer


def lstm_unit(c: Tensor, gates: Tensor, cont: Tensor) -> tuple[Tensor, Tensor]:
    """The next cell state and the output, from the state before and the four gates' inputs (input, forget, output, candidate)."""
    i, f, o, g = gates.chunk(4, -1)
    c = cont * torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return c, torch.sigmoid(o) * torch.tanh(c)


class Recurrent(Layer):
    """What RNN and LSTM share; `states` says how many there are, `gates` how many numbers per output drive a step."""

    in_place = False
    no_force = not_differentiable = frozenset({1})
    states: ClassVar[int]
    gates: ClassVar[int]

    def setup(self, *bottoms: Shape) -> None:
        p = self.param.recurrent_param
        exposed = self.states if p.expose_hidden else 0
        self.require(p.num_output > 0, "num_output must be positive")
        self.require(2 + exposed <= len(bottoms) <= 3 + exposed, f"takes {2 + exposed} bottoms, or {3 + exposed} with a static input, "
                     f"{'with' if exposed else 'without'} expose_hidden; not {len(bottoms)}")
        self.require(len(self.param.top) == 1 + exposed, f"makes {1 + exposed} tops, not {len(self.param.top)}")
        self.static = len(bottoms) == 3 + exposed
        self.steps = bottoms[0][:1]
        self.require(len(bottoms[0]) >= 3, f"x must have three or more axes (T, N, ...), not {bottoms[0]}")
        size = self.gates * p.num_output
        self.declare((size, prod(bottoms[0][2:])), p.weight_filler)
        self.declare((size,), p.bias_filler)
        if self.static:
            self.declare((size, prod(bottoms[2][1:])), p.weight_filler)
        self.declare((size, p.num_output), p.weight_filler)

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        x, cont, *rest = bottoms
        size = self.param.recurrent_param.num_output
        self.require(x[:1] == self.steps, f"was made for {self.steps[0]} time steps, but x has shape {x}")
        inputs = self.declared[0][0][1]
        self.require(prod(x[2:]) == inputs, f"has weights for {inputs} numbers per step, but x has shape {x}")
        self.require(cont == x[:2], f"cont has shape {cont}; it must have x's first two axes, {x[:2]}")
        if self.static:
            static = rest.pop(0)
            self.require(static[:1] == x[1:2] and prod(static[1:]) == self.declared[2][0][1],
                         f"the static input of shape {static} does not fit x of shape {x} and weights of shape {self.declared[2][0]}")
        state = (1, x[1], size)
        for shape in rest:
            self.require(shape == state, f"an initial state has shape {shape}; it must be {state}")
        if not self.state or tuple(self.state[0].shape) != state[1:]:
            self.state = [torch.zeros(state[1:], device=self.context.device, dtype=self.context.dtype) for _ in range(self.states)]
        return [(*x[:2], size), *[state] * len(rest)]

    def step(self, drive: Tensor, state: list[Tensor], cont: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One time step: the output (N, D) and the next states, from the input's part of the gates (N, gates * D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, cont: Tensor, *rest: Tensor) -> list[Tensor]:
        drive = F.linear(x.flatten(2), self.params[0], self.params[1])
        if self.static:
            drive = drive + F.linear(rest[0].flatten(1), self.params[2])
        exposed = rest[1:] if self.static else rest
        state = [s.detach()[0] for s in exposed] or [s.clone() for s in self.state]
        outputs = []
        for t in range(x.shape[0]):
            output, state = self.step(drive[t], state, cont[t, :, None])
            outputs.append(output)
        if exposed:
            return [torch.stack(outputs), *(s.detach()[None] for s in state)]
        for kept, s in zip(self.state, state, strict=True):
            kept.copy_(s.detach())
        return [torch.stack(outputs)]


@layer("RNN")
class RNN(Recurrent):
    """h = tanh(W_hh (cont h) + W_xh x + b_h), o = tanh(W_ho h + b_o); parameters W_xh, b_h, (W_xh_static), W_hh, W_ho, b_o; state h."""

    bottoms: ClassVar[Count] = (2, 4)
    tops: ClassVar[Count] = (1, 2)
    states, gates = 1, 1

    def setup(self, *bottoms: Shape) -> None:
        super().setup(*bottoms)
        p = self.param.recurrent_param
        self.declare((p.num_output, p.num_output), p.weight_filler)
        self.declare((p.num_output,), p.bias_filler)

    def step(self, drive: Tensor, state: list[Tensor], cont: Tensor) -> tuple[Tensor, list[Tensor]]:
        *_, recurrent, weight, bias = self.params
        h = torch.tanh(F.linear(cont * state[0], recurrent) + drive)
        return torch.tanh(F.linear(h, weight, bias)), [h]


@layer("LSTM")
class LSTM(Recurrent):
    """Gates W_hc (cont h) + W_xc x + b_c drive an LSTMUnit; parameters W_xc, b_c, (W_xc_static), W_hc; states h and c.

    Rows of the weights are gates in the order input, forget, output, candidate.
    """

    bottoms: ClassVar[Count] = (2, 5)
    tops: ClassVar[Count] = (1, 3)
    states, gates = 2, 4

    def step(self, drive: Tensor, state: list[Tensor], cont: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, c = state
        c, h = lstm_unit(c, F.linear(cont * h, self.params[-1]) + drive, cont)
        return h, [h, c]


@layer("LSTMUnit")
class LSTMUnit(Layer):
    """One step of an LSTM: from c (1, N, D), gates (1, N, 4 D) and cont (1, N) to the next c and h.  Caffe: lstm_unit_layer.cpp."""

    bottoms, tops, in_place = 3, 2, False
    no_force = not_differentiable = frozenset({2})

    def top_shapes(self, c: Shape, gates: Shape, cont: Shape) -> list[Shape]:
        self.require(len(c) == 3 and c[0] == 1 and gates == (1, c[1], 4 * c[2]) and cont == c[:2],
                     f"bottoms of shapes {c}, {gates} and {cont} are not (1, N, D), (1, N, 4 D) and (1, N)")
        return [c, c]

    def forward(self, c: Tensor, gates: Tensor, cont: Tensor) -> tuple[Tensor, Tensor]:
        return lstm_unit(c, gates, cont[..., None])
