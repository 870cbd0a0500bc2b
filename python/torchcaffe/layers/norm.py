"""Normalisation, and the per-channel scales and shifts that follow it in Caffe nets."""
from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.layers.per_channel import affine, is_little, little, normalise
from torchcaffe.proto import caffe_pb2


@layer("BatchNorm")
class BatchNorm(Layer):
    """(x - mean) / sqrt(variance + eps) per channel; a Scale layer usually follows.

    Parameters mean (C), variance (C) and factor (1), zero at first; no solver moves them.  With batch statistics (the default in
    TRAIN) every forward pass adds to them: factor = f * factor + 1, mean = f * mean + batch mean,
    variance = f * variance + unbiased batch variance, f = moving_average_fraction; y itself uses the biased variance.  With
    stored statistics (the default in TEST) mean and variance are divided by factor, and count as 0 while factor is 0.
    use_global_stats: false updates them in TEST too.  Caffe: batch_norm_layer.cpp.
    """

    batch: tuple[Tensor, Tensor] | None = None          # zeros for the batch's mean and variance where step/statistics.py adds them up

    def setup(self, x: Shape) -> None:
        p = self.param.batch_norm_param
        self.require(len(x) >= 2, f"needs a channel axis, but the bottom has shape {x}")
        self.stored = p.use_global_stats if p.HasField("use_global_stats") else self.phase == caffe_pb2.TEST
        self.fraction, self.eps, self.channels = p.moving_average_fraction, p.eps, x[1]
        for size in (x[1], x[1], 1):
            self.declare((size,), caffe_pb2.FillerParameter())
        for spec in self.param.param:
            self.require(spec.lr_mult == 0, "its three parameters are statistics; write lr_mult: 0 for each, or no param at all")
        for _ in range(3 - len(self.param.param)):
            self.param.param.add(lr_mult=0)

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.require(len(x) >= 2 and x[1] == self.channels, f"has statistics of {self.channels} channels, but the bottom has shape {x}")
        return [x]

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The stored mean and variance, (C) each: what was added up, divided by factor."""
        mean, variance, factor = (p.detach() for p in self.params)
        share = torch.where(factor == 0, 0.0, 1 / factor)
        return mean * share, variance * share

    def normalise(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, relu: bool = False, own: bool = False,
                  own_gradient: bool = False) -> Tensor:
        """The layer, and a Scale by `weight` and `bias` (C each) and a ReLU that follow.  Updates the parameters.

        What `own` and `own_gradient` permit: per_channel.normalise.
        """
        if self.stored:
            y = self._by_stored(x, weight, bias)
            return F.relu_(y) if relu else y
        count = x.numel() // self.channels
        if self.batch and x.device.type == "cuda":           # its kernels leave the statistics where they are collected
            y = torch.batch_norm(x, weight, bias, *self.batch, True, 1.0, self.eps, True)
            if count == 1:                                   # one value per channel: 0 / 0 there, 0 in Caffe
                self.batch[1].data.zero_()                   # unseen by autograd, which keeps it for gradients by stored statistics
            return y.relu_() if relu else y
        if self.is_little(x.shape):
            found = self.room()
            y = little(x, weight, bias, *found, self.eps, relu)
            self.add(*found)
            return y
        y, batch_mean, batch_variance = normalise(x, weight, bias, self.eps, relu, own, own_gradient, self.context.traced)
        unbiased = count / max(count - 1, 1)
        if self.batch:
            self.batch[0].copy_(batch_mean)
            self.batch[1].copy_(batch_variance * unbiased)
        else:
            self.add(batch_mean, batch_variance, unbiased)
        return y

    def is_little(self, shape: Shape) -> bool:
        """Whether per_channel.normalise_little computes the layer for a bottom of this shape."""
        context = self.context
        return is_little(shape) and not self.stored and context.device.type == "cpu" and context.precision == "fp32" and not context.traced

    def room(self) -> tuple[Tensor, Tensor]:
        """Zeros for a batch's mean and variance, which add() takes."""
        if self.batch:
            return self.batch
        mean, variance = torch.zeros(2, self.channels, dtype=self.context.dtype)
        return mean, variance

    def add(self, batch_mean: Tensor, batch_variance: Tensor, factor: float = 1) -> None:
        """Add a batch's mean, and its variance times a factor, to the parameters, unless step/statistics.py will."""
        if self.batch:
            return
        mean, variance, count = (p.detach() for p in self.params)
        torch._foreach_mul_([mean, variance, count], self.fraction)
        mean.add_(batch_mean)
        variance.add_(batch_variance, alpha=factor)
        count.add_(1)

    def _by_stored(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, variance = self.statistics()
        if any(p is not None and p.requires_grad for p in (weight, bias)):
            scale = (variance + self.eps).rsqrt()
            return affine(x - mean.reshape(-1, *[1] * (x.dim() - 2)), scale if weight is None else weight * scale, bias)
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, self.eps, True)


class Affine(Layer):
    """What Scale and Bias share: a parameter, or a second bottom, that spans some axes of the first bottom.

    It spans num_axes axes from `axis` on: 1 by default, all the rest with -1, none (a single number) with 0.
    """

    bottoms, tops = (1, 2), 1

    def spanned(self, x: Shape, axis: int, num_axes: int) -> Shape:
        """The shape of the parameter for a bottom of shape x."""
        self.require(num_axes >= -1, f"num_axes {num_axes} is neither -1 nor a count")
        if num_axes == 0:
            return ()
        start = self.axis(axis, len(x))
        stop = len(x) if num_axes == -1 else start + num_axes
        self.require(stop <= len(x), f"num_axes {num_axes} from axis {axis} reaches beyond the bottom's shape {x}")
        return x[start:stop]

    def place(self, x: Shape, other: Shape, axis: int) -> None:
        """Remember where `other` lies on x; refuse what does not fit."""
        start = self.axis(axis, len(x)) if other else 0
        self.require(x[start:start + len(other)] == other,
                     f"the factor or bias of shape {other} does not fit the bottom's shape {x} at axis {start}")
        self.view = (1,) * start + other + (1,) * (len(x) - start - len(other))
        self.per_channel = start == 1 and len(other) == 1 and other[0] > 0          # batch_norm needs channels

    def apply(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        if self.per_channel:
            return affine(x, scale, shift)
        y = x if scale is None else x * scale.reshape(self.view)
        return y if shift is None else y + shift.reshape(self.view)


@layer("Scale")
class Scale(Affine):
    """x times a parameter (1 at first) or a second bottom, plus a parameter (0 at first) with bias_term.

    With a second bottom the bias is the only parameter.  Both are decayed unless their param says otherwise.
    Caffe: scale_layer.cpp.
    """

    def setup(self, x: Shape, factor: Shape | None = None) -> None:
        p = self.param.scale_param
        shape = self.spanned(x, p.axis, p.num_axes) if factor is None else factor
        if factor is None:
            self.declare(shape, p.filler if p.HasField("filler") else caffe_pb2.FillerParameter(value=1))
        if p.bias_term:
            self.declare(shape, p.bias_filler)

    def top_shapes(self, x: Shape, factor: Shape | None = None) -> list[Shape]:
        self.place(x, self.declared[0][0] if factor is None else factor, self.param.scale_param.axis)
        return [x]

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        scale, *shift = [*self.params] if factor is None else [factor, *self.params]
        return self.apply(x, scale, shift[0] if shift else None)


@layer("Bias")
class Bias(Affine):
    """x plus a parameter (0 at first) or a second bottom.  Caffe: bias_layer.cpp."""

    def setup(self, x: Shape, bias: Shape | None = None) -> None:
        p = self.param.bias_param
        if bias is None:
            self.declare(self.spanned(x, p.axis, p.num_axes), p.filler)

    def top_shapes(self, x: Shape, bias: Shape | None = None) -> list[Shape]:
        self.place(x, self.declared[0][0] if bias is None else bias, self.param.bias_param.axis)
        return [x]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.apply(x, None, self.params[0] if bias is None else bias)


@layer("LRN")
class LRN(Layer):
    """x * (k + alpha / n * sum of x^2 over n = local_size neighbouring channels) ^ -beta.

    WITHIN_CHANNEL sums over n x n neighbouring pixels instead, with alpha / n^2, and ignores k: it uses 1.
    Caffe: lrn_layer.cpp; Krizhevsky et al. 2012, section 3.3.
    """

    def setup(self, x: Shape) -> None:
        size = self.param.lrn_param.local_size
        self.require(size % 2 == 1, f"local_size {size} is even; only odd sizes have a middle")

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.require(len(x) == 4, f"needs a blob of four axes (N, C, H, W), not {x}")
        return [x]

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.lrn_param
        if not x.numel():
            return x.clone()
        across = p.norm_region == p.ACROSS_CHANNELS
        size = min(p.local_size, 2 * max(x.shape[1:2] if across else x.shape[2:]) - 1)        # what lies further out is nothing but zeros
        if across:
            return F.local_response_norm(x, size, p.alpha * (size / p.local_size), p.beta, p.k)
        mean = F.avg_pool2d(x.square(), size, 1, size // 2)
        return x * (1 + p.alpha * (size / p.local_size) ** 2 * mean).pow(-p.beta)


class _Standardise(torch.autograd.Function):
    """(x - mean) / (std + eps) over the last axis.  Caffe's gradient takes y for (x - mean) / std, as if eps were 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        std = centred.square().mean(-1, keepdim=True).sqrt() + eps
        y = centred / std
        ctx.save_for_backward(y, std)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, std = ctx.saved_tensors
        return (dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True)) / std, None


@layer("MVN")
class MVN(Layer):
    """Mean 0 and, with normalize_variance, variance 1, over each channel of each item, or over all channels with across_channels.

    eps is added to the standard deviation.  The top always has four axes.  Caffe: mvn_layer.cpp.
    """

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.require(len(x) <= 4, f"takes blobs of at most four axes, not {x}")
        return [x + (1,) * (4 - len(x))]

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.mvn_param
        shape = (*x.shape, *[1] * (4 - x.dim()))
        items = 1 if p.across_channels else 2
        rows = x.reshape(prod(shape[:items]), prod(shape[items:]))
        y = _Standardise.apply(rows, p.eps) if p.normalize_variance else rows - rows.mean(-1, keepdim=True)
        return y.reshape(shape)
