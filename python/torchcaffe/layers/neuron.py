"""Layers that treat every element alike: activations, powers and logarithms, dropout.

All but AbsVal may work in place.  Caffe's Power, Log, BNLL and Clip then read the overwritten bottom in backward, and Power and Log
write over the top's diff before they read it; their `in_place_gradient` follows.  ReLU, PReLU and ELU treat 0 as negative.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.proto import caffe_pb2


class Neuron(Layer):
    """One bottom, one top of the same shape."""

    bottoms, tops = 1, 1

    def top_shapes(self, x: Shape) -> list[Shape]:
        return [x]


@layer("ReLU")
class ReLU(Neuron):
    """max(x, 0) + negative_slope * min(x, 0).  Caffe: relu_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        slope = self.param.relu_param.negative_slope
        return F.leaky_relu(x, slope) if slope else F.relu(x)


@layer("PReLU")
class PReLU(Neuron):
    """ReLU with a learned slope per channel, or one (of shape ()) with channel_shared; 0.25 at first.  Caffe: prelu_layer.cpp."""

    def setup(self, x: Shape) -> None:
        self.require(len(x) >= 2, f"needs a channel axis, but the bottom has shape {x}")
        p = self.param.prelu_param
        self.declare(() if p.channel_shared else (x[1],), p.filler if p.HasField("filler") else caffe_pb2.FillerParameter(value=0.25))
        self.channels = x[1]

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.require(len(x) >= 2 and x[1] == self.channels, f"has {self.channels} slopes, but the bottom has shape {x}")
        return [x]

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.params[0].reshape(-1))


@layer("ELU")
class ELU(Neuron):
    """x where it is positive, alpha * (exp(x) - 1) elsewhere.  Caffe: elu_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, self.param.elu_param.alpha)


@layer("Sigmoid")
class Sigmoid(Neuron):
    """1 / (1 + exp(-x)).  Caffe: sigmoid_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@layer("TanH")
class TanH(Neuron):
    """The hyperbolic tangent.  Caffe: tanh_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@layer("Dropout")
class Dropout(Neuron):
    """Zeroes elements with probability dropout_ratio in TRAIN and divides the others by 1 - dropout_ratio; nothing in TEST.

    The mask depends on the seed, the layer's name and its forward pass; not on memory layout or number type.
    Caffe: dropout_layer.cpp.
    """

    def setup(self, x: Shape) -> None:
        ratio = self.param.dropout_param.dropout_ratio
        self.require(0 <= ratio < 1, f"dropout_ratio {ratio:g} is not in [0, 1)")
        self.keep = 1 - ratio
        self.ticks = self.phase == caffe_pb2.TRAIN

    def forward(self, x: Tensor) -> Tensor:
        if self.phase == caffe_pb2.TEST:
            return x
        mask = self.context.streams.uniform("dropout", self.name, self.tick(), x.shape, x.device) < self.keep
        return x * mask.to(x.dtype).div_(self.keep)


@layer("Power")
class Power(Neuron):
    """(shift + scale * x) ^ power.

    The gradient at shift + scale * x = 0 is the true one, where Caffe divides 0 by 0 for powers other than 1 and 2.
    Caffe: power_layer.cpp.
    """

    @property
    def is_zero(self) -> bool:
        """Whether the top is 0 whatever the bottom is."""
        p = self.param.power_param
        return p.scale == 0 and p.shift == 0 and p.power > 0

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.power_param
        if p.scale == 0 or p.power == 0:
            return torch.full_like(x, 1 if p.power == 0 else _power(p.shift, p.power))
        if p.scale != 1:
            x = x * p.scale
        if p.shift != 0:
            x = x + p.shift
        return x if p.power == 1 else x.pow(p.power)

    def in_place_gradient(self, y: Tensor, dy: Tensor) -> Tensor:
        p = self.param.power_param
        slope = p.scale * p.power
        if slope == 0 or p.power == 1:
            return torch.full_like(y, slope * slope)
        inner = p.scale * y + p.shift
        factor = slope * (inner if p.power == 2 else y / inner)     # y stands for x and for what it was raised to
        return factor * factor


def _power(base: float, exponent: float) -> float:
    """As C's pow: NaN and infinity where Python raises."""
    return float(torch.tensor(base, dtype=torch.float64).pow(exponent))


def _log_base(owner: Neuron, base: float) -> float:
    """log(base), where -1 stands for e."""
    owner.require(base == -1 or (base > 0 and math.isfinite(base)), f"base {base:g} is neither positive nor -1 (which means e)")
    return 1.0 if base == -1 else math.log(base)


@layer("Exp")
class Exp(Neuron):
    """base ^ (shift + scale * x); base -1 (the default) means e.  Caffe: exp_layer.cpp."""

    def setup(self, x: Shape) -> None:
        p = self.param.exp_param
        log_base = _log_base(self, p.base)
        self.inner, self.outer = log_base * p.scale, float(torch.tensor(log_base * p.shift, dtype=torch.float64).exp())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(x if self.inner == 1 else x * self.inner)
        return y if self.outer == 1 else y * self.outer


@layer("Log")
class Log(Neuron):
    """The logarithm of shift + scale * x to the given base; base -1 (the default) means e.  Caffe: log_layer.cpp."""

    def setup(self, x: Shape) -> None:
        log_base = _log_base(self, self.param.log_param.base)
        self.require(log_base != 0, "there is no logarithm to base 1")
        self.factor = 1 / log_base

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.log_param
        y = torch.log(x * p.scale + p.shift)
        return y if self.factor == 1 else y * self.factor

    def in_place_gradient(self, y: Tensor, dy: Tensor) -> Tensor:
        p = self.param.log_param
        factor = self.factor * p.scale / (p.scale * y + p.shift)
        return factor * factor


@layer("AbsVal")
class AbsVal(Neuron):
    """|x|, with gradient 0 at 0.  Caffe: absval_layer.cpp."""

    in_place = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.abs(x)


@layer("BNLL")
class BNLL(Neuron):
    """log(1 + exp(x)), the binomial normal log likelihood.  Caffe: bnll_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x, threshold=50)

    def in_place_gradient(self, y: Tensor, dy: Tensor) -> Tensor:
        return dy * torch.sigmoid(y)


@layer("Clip")
class Clip(Neuron):
    """x limited to [min, max]; the gradient passes at both limits.  Caffe: clip_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.clip_param
        below = torch.where(x > p.max, p.max, x)                # clamp's gradient at a limit depends on torch's version
        return torch.where(below < p.min, p.min, below)

    def in_place_gradient(self, y: Tensor, dy: Tensor) -> Tensor:
        p = self.param.clip_param
        return dy * ((y >= p.min) & (y <= p.max))


@layer("Swish")
class Swish(Neuron):
    """x * sigmoid(beta * x).  Caffe: swish_layer.cpp."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.param.swish_param.beta)


@layer("Threshold")
class Threshold(Neuron):
    """1 where x > threshold, 0 elsewhere; Caffe has no backward for it.  Caffe: threshold_layer.cpp."""

    not_differentiable = "all"

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.param.threshold_param.threshold).to(x.dtype)
