"""Layers that slide a window over the axes behind the channels: convolution and pooling."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.layers.layout import channels_last
from torchcaffe.layers.per_channel import column_sums, rows
from torchcaffe.proto import caffe_pb2

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DECONVOLVE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Windowed(Layer):
    """What Convolution, Deconvolution and Im2col share: where the channels are, and the window's geometry per spatial axis.

    All axes before the channels (`axis`, 1 by default) count items.  kernel_size, stride, pad and dilation are written once for all
    spatial axes or once for each; kernel_h and kernel_w (and so on) in their place for two spatial axes.  Sizes are rounded
    down.  Caffe: base_conv_layer.cpp.
    """

    def setup(self, *bottoms: Shape) -> None:
        x = bottoms[0]
        self.channel_axis = self.axis(self.param.convolution_param.axis, len(x))
        self.channels = x[self.channel_axis]
        self.spatial = len(x) - self.channel_axis - 1
        self.require(1 <= self.spatial <= 3,
                     f"needs 1 to 3 axes behind the channels, but the bottom has shape {x} with channels on axis {self.channel_axis}")
        self.kernel = self._per_axis("kernel_size", "kernel_h", "kernel_w", None)
        self.stride = self._per_axis("stride", "stride_h", "stride_w", 1)
        self.pad = self._per_axis("pad", "pad_h", "pad_w", 0)
        self.dilation = self._per_axis("dilation", None, None, 1)
        for what, values in (("kernel_size", self.kernel), ("stride", self.stride), ("dilation", self.dilation)):
            self.require(min(values) > 0, f"{what} {values} must be positive")
        self.extent = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    def _per_axis(self, name: str, high: str | None, wide: str | None, default: int | None) -> tuple[int, ...]:
        p = self.param.convolution_param
        values = tuple(getattr(p, name))
        if high and wide and (p.HasField(high) or p.HasField(wide)):
            self.require(self.spatial == 2 and not values, f"{high} and {wide} are for two spatial axes and take the place of {name}")
            return getattr(p, high), getattr(p, wide)
        self.require(values or default is not None, f"{name} is missing")
        self.require(len(values) in (0, 1, self.spatial),
                     f"{len(values)} values of {name} for {self.spatial} spatial axes; write one or one for each")
        return (values or (default or 0,)) * (1 if len(values) == self.spatial else self.spatial)

    def check(self, x: Shape) -> None:
        self.require(len(x) == self.channel_axis + 1 + self.spatial and x[self.channel_axis] == self.channels,
                     f"has weights for {self.channels} channels on axis {self.channel_axis} and {self.spatial} spatial axes, "
                     f"but the bottom has shape {x}")

    def windows(self, x: Shape) -> tuple[int, ...]:
        """How many windows fit along each spatial axis; torch ends the process where the padding is beyond all measure."""
        self.possible((*x[:self.channel_axis + 1], *(n + 2 * p for n, p in zip(x[self.channel_axis + 1:], self.pad, strict=True))),
                      "the bottom with its pad")
        sizes = tuple((n + 2 * p - e) // s + 1
                      for n, p, e, s in zip(x[self.channel_axis + 1:], self.pad, self.extent, self.stride, strict=True))
        self.require(min(sizes) > 0, f"the window of size {self.extent} does not fit into the bottom of shape {x} with pad {self.pad}")
        return sizes


class _Convolve(torch.autograd.Function):
    """torch.convolution with a bias whose gradient is an exact sum; torch's own is wrong by 1e-3 for 128 items of 32x32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *ctx.geometry, [*wanted, False]) if any(wanted) \
            else (None, None, None)
        return dx, dweight, column_sums(rows(dy)).to(weight.dtype), None


class Convolving(Windowed):
    """Weights shared by several bottoms of one shape, each with a top of its own."""

    bottoms, tops, same_count, in_place = (1, None), (1, None), True, False

    def setup(self, *bottoms: Shape) -> None:
        super().setup(*bottoms)
        p = self.param.convolution_param
        self.require(p.num_output > 0, "num_output must be positive")
        self.require(p.group > 0 and self.channels % p.group == 0 and p.num_output % p.group == 0,
                     f"group {p.group} does not divide {self.channels} channels and num_output {p.num_output}")
        self.declare(self.weight_shape(), p.weight_filler)
        if p.bias_term:
            self.declare((p.num_output,), p.bias_filler)

    def weight_shape(self) -> Shape:
        raise NotImplementedError

    def sizes(self, x: Shape) -> tuple[int, ...]:
        """The top's size along each spatial axis."""
        raise NotImplementedError

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation on (N, C, spatial axes)."""
        raise NotImplementedError

    def sums_its_bias(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the bias learns where torch does not sum its gradient with care: on a CPU, in full precision."""
        return bias is not None and bias.requires_grad and x.device.type == "cpu" and self.context.precision == "fp32"

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        for x in bottoms:
            self.check(x)
            self.require(x == bottoms[0], f"the bottoms have the shapes {bottoms[0]} and {x}; all must have one shape")
        x = bottoms[0]
        return [(*x[:self.channel_axis], self.param.convolution_param.num_output, *self.sizes(x))] * len(bottoms)

    def forward(self, *bottoms: Tensor) -> list[Tensor]:
        weight, bias = self.params[0], self.params[1] if len(self.params) > 1 else None
        tops = []
        for x in bottoms:
            y = self.convolve(x if self.channel_axis == 1 else x.reshape(-1, *x.shape[self.channel_axis:]), weight, bias)
            tops.append(y if self.channel_axis == 1 else y.reshape(*x.shape[:self.channel_axis], *y.shape[1:]))
        return tops


def taken(x: Tensor, stride: tuple[int, int], factor: Tensor) -> Tensor:
    """One pixel of each stride in x (N, C, H, W), times a factor per channel (1, C, 1, 1)."""
    return channels_last(x[:, :, ::stride[0], ::stride[1]] * factor)


class _Subsample(torch.autograd.Function):
    """One pixel of each stride in x (N, C, H, W), channels-last, times a factor per channel (1, C, 1, 1).

    This is what a frozen pointwise convolution per channel does, as in shortcuts that take every second pixel; torch's own kernels for
    that take four times as long backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, int], factor: Tensor) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        ctx.save_for_backward(factor)
        return taken(x, stride, factor)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        factor, = ctx.saved_tensors
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last).zero_()
        torch.mul(dy, factor, out=dx[:, :, ::ctx.stride[0], ::ctx.stride[1]])
        return dx, None, None


class _Fork(torch.autograd.Function):
    """x (N, C, H, W), and what _Subsample takes of it.

    The gradients of both become one in the memory of the first, which must belong to nothing else: no zeros are written or added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, int], factor: Tensor) -> tuple[Tensor, Tensor]:
        ctx.stride = stride
        ctx.save_for_backward(factor)
        return x.view_as(x), taken(x, stride, factor)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor, None, None]:
        factor, = ctx.saved_tensors
        dx[:, :, ::ctx.stride[0], ::ctx.stride[1]].add_(dy * factor)
        return dx, None, None


@layer("Convolution")
class Convolution(Convolving):
    """Cross-correlation with weights (num_output, channels / group, kernel) and, unless bias_term is false, a bias (num_output).

    Caffe: conv_layer.cpp.
    """

    def weight_shape(self) -> Shape:
        p = self.param.convolution_param
        return (p.num_output, self.channels // p.group, *self.kernel)

    def sizes(self, x: Shape) -> tuple[int, ...]:
        return self.windows(x)

    @property
    def subsamples(self) -> bool:
        """Whether it takes one pixel of each stride, times a factor per channel."""
        p = self.param.convolution_param
        return (p.group == self.channels == p.num_output and set(self.kernel) == {1} and not any(self.pad) and self.spatial == 2
                and self.channel_axis == 1 and not p.bias_term)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for a layer whose backward makes a new tensor, and the top of this one, which subsamples."""
        y: tuple[Tensor, Tensor] = _Fork.apply(channels_last(x), self.stride, self.params[0].detach().reshape(1, -1, 1, 1))
        return y

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        group = self.param.convolution_param.group
        if self.subsamples and bias is None and not weight.requires_grad:
            high, wide = self.stride
            x, factor = channels_last(x), weight.reshape(1, -1, 1, 1)
            y: Tensor = _Subsample.apply(x, (high, wide), factor) if x.requires_grad else taken(x, (high, wide), factor)
            return y
        x = channels_last(x)
        if self.sums_its_bias(x, bias):
            z: Tensor = _Convolve.apply(x, weight, bias, (self.stride, self.pad, self.dilation, False, (0,) * self.spatial, group))
            return z
        return CONVOLVE[self.spatial](x, weight, bias, self.stride, self.pad, self.dilation, group)


@layer("Deconvolution")
class Deconvolution(Convolving):
    """The transpose of Convolution: weights (channels, num_output / group, kernel), size stride * (n - 1) + window - 2 pad.

    Caffe: deconv_layer.cpp.
    """

    def weight_shape(self) -> Shape:
        p = self.param.convolution_param
        return (self.channels, p.num_output // p.group, *self.kernel)

    def sizes(self, x: Shape) -> tuple[int, ...]:
        self.require(min(x[self.channel_axis:]) > 0, f"the bottom of shape {x} has nothing to take windows of")
        sizes = tuple(s * (n - 1) + e - 2 * p
                      for n, s, e, p in zip(x[self.channel_axis + 1:], self.stride, self.extent, self.pad, strict=True))
        self.possible((*x[:self.channel_axis], self.param.convolution_param.num_output,
                       *(n + 2 * p for n, p in zip(sizes, self.pad, strict=True))), "the top before pad is cut off")
        self.require(min(sizes) > 0, f"pad {self.pad} leaves nothing of the bottom of shape {x}")
        return sizes

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        group = self.param.convolution_param.group
        if self.sums_its_bias(x, bias):
            y: Tensor = _Convolve.apply(x, weight, bias, (self.stride, self.pad, self.dilation, True, (0,) * self.spatial, group))
            return y
        return DECONVOLVE[self.spatial](x, weight, bias, self.stride, self.pad, 0, group, self.dilation)


@layer("Im2col")
class Im2col(Windowed):
    """The windows that Convolution multiplies, as channels: (N, C, spatial) to (N, C * kernel, windows).  Caffe: im2col_layer.cpp."""

    in_place = False

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.check(x)
        return [(*x[:self.channel_axis], self.channels * prod(self.kernel), *self.windows(x))]

    def forward(self, x: Tensor) -> Tensor:
        shape, = self.top_shapes(tuple(x.shape))
        first = self.channel_axis + 1
        x = F.pad(x, [p for p in reversed(self.pad) for _ in range(2)])
        for i in range(self.spatial):               # each spatial axis becomes (windows, kernel), the kernels last
            x = x.unfold(first + i, self.extent[i], self.stride[i])[..., ::self.dilation[i]]
        kernels = range(first + self.spatial, x.dim())
        return x.permute(*range(first), *kernels, *range(first, first + self.spatial)).reshape(shape)


class _Mean(torch.autograd.Function):
    """The mean over H and W of x (N, C, H, W), as (N, C, 1, 1).

    Its gradient has its channels last, as x has; torch writes it row by row, and whatever changes from one to the other is slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return channels_last((dy / prod(ctx.shape[2:])).expand(ctx.shape))


@dataclass(frozen=True)
class Pool:
    """The windows of a pooling layer, with Caffe's rules for those at the border.

    Along each axis there are ceil((n + 2 pad - kernel) / stride) + 1 windows (floor if so asked); if there is padding on any axis, a last
    one that would start in the padding behind the image is dropped.  Without padding the last one may lie wholly outside
    (only if stride > kernel).  Caffe: pooling_layer.cpp.
    """
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int] = (0, 0)
    ceil: bool = True

    def sizes(self, image: Sequence[int]) -> tuple[int, int]:
        """How many windows there are along each axis of an image (H, W); 0 or less where the kernel is too big."""
        def count(n: int, kernel: int, stride: int, pad: int) -> int:
            span = n + 2 * pad - kernel
            windows = (-(-span // stride) if self.ceil else span // stride) + 1
            return windows - (any(self.pad) and (windows - 1) * stride >= n + pad)
        high, wide = (count(*a) for a in zip(image, self.kernel, self.stride, self.pad, strict=True))
        return high, wide

    def _padded(self, x: Tensor, value: float) -> tuple[Tensor, tuple[int, int]]:
        """x, and the padding that is left to torch, which refuses more than half a kernel."""
        if all(2 * p <= k for p, k in zip(self.pad, self.kernel, strict=True)):
            return x, self.pad
        high, wide = self.pad
        return F.pad(x, (wide, wide, high, high), value=value), (0, 0)

    def _fitted(self, y: Tensor, sizes: tuple[int, int], value: float) -> Tensor:
        """torch's result with Caffe's number of windows: without those in the padding, with those outside the image."""
        if tuple(y.shape[2:]) == sizes:
            return y
        return F.pad(y, (0, sizes[1] - y.shape[3], 0, sizes[0] - y.shape[2]), value=value)

    def maximum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum of each window, and its index in the image (row by row); the first of several equal ones.

        A window outside the image gives the lowest float32 and -1.
        """
        sizes = self.sizes(x.shape[2:])
        padded, pad = self._padded(x, -torch.inf)
        y, index = F.max_pool2d(padded, self.kernel, self.stride, pad, ceil_mode=self.ceil, return_indices=True)
        if pad != self.pad:
            row, column = index // padded.shape[3] - self.pad[0], index % padded.shape[3] - self.pad[1]
            index = row * x.shape[3] + column
        return self._fitted(y, sizes, torch.finfo(torch.float32).min), self._fitted(index, sizes, -1)

    def takes_all(self, shape: Sequence[int]) -> bool:
        """Whether the one window is the image."""
        return self.kernel == tuple(shape[2:]) and not any(self.pad)

    def average(self, x: Tensor) -> Tensor:
        """The mean of each window, cut off where the padding ends: padding counts in the divisor, what lies beyond does not.

        A window that begins where the image ends gives 0 / 0.
        """
        sizes = self.sizes(x.shape[2:])
        if self.takes_all(x.shape):
            mean: Tensor = _Mean.apply(x) if x.requires_grad else x.mean((2, 3), keepdim=True)
            return mean
        padded, pad = self._padded(x, 0)
        if all((n - 1) * s < size + p for n, s, size, p in zip(sizes, self.stride, x.shape[2:], self.pad, strict=True)):
            return self._fitted(F.avg_pool2d(padded, self.kernel, self.stride, pad, ceil_mode=self.ceil), sizes, 0)
        total = F.avg_pool2d(padded, self.kernel, self.stride, pad, ceil_mode=self.ceil, divisor_override=1)
        high, wide = ((size - s * torch.arange(n, device=x.device)).clamp(max=k)
                      for n, k, s, size in zip(sizes, self.kernel, self.stride, x.shape[2:], strict=True))
        return self._fitted(total, sizes, 0) / (high[:, None] * wide)


@layer("Pooling")
class Pooling(Layer):
    """Maximum (the default) or average over windows of the last two axes of (N, C, H, W); class Pool has the rules.

    A second top of MAX holds the index of each maximum.  A gradient goes to the first maximum alone.  Caffe: pooling_layer.cpp.
    """

    tops, in_place = (1, 2), False

    def setup(self, x: Shape) -> None:
        p = self.param.pooling_param
        self.require(p.pool != p.STOCHASTIC, "stochastic pooling is not implemented (Caffe has it on GPUs only); use MAX or AVE")
        self.require(p.pool == p.MAX or len(self.param.top) < 2, "a second top (the mask) is for MAX pooling")
        kernel = self._pair("kernel_size", "kernel_h", "kernel_w")
        stride, pad = self._pair("stride", "stride_h", "stride_w") or (1, 1), self._pair("pad", "pad_h", "pad_w") or (0, 0)
        if p.global_pooling:
            self.require(kernel is None and stride == (1, 1) and pad == (0, 0), "global_pooling goes without kernel, stride and pad")
        else:
            self.require(kernel and min(kernel) > 0, "kernel_size, or kernel_h and kernel_w, must be given and positive")
        self.require(min(stride) > 0, f"stride {stride} must be positive")
        self.pool = Pool(kernel or (0, 0), stride, pad, p.round_mode == p.CEIL)
        self.require(p.global_pooling or all(a < b for a, b in zip(pad, self.pool.kernel, strict=True)),
                     f"pad {pad} must be smaller than the kernel {kernel}")

    def _pair(self, name: str, high: str, wide: str) -> tuple[int, int] | None:
        """A field for both axes or a field for each; None where neither is written."""
        p = self.param.pooling_param
        both, each = p.HasField(name), (p.HasField(high), p.HasField(wide))
        self.require(not any(each) or (all(each) and not both), f"write {name}, or {high} and {wide}")
        return (getattr(p, high), getattr(p, wide)) if any(each) else (getattr(p, name),) * 2 if both else None

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.require(len(x) == 4, f"needs a blob of four axes (N, C, H, W), not {x}")
        self.require(min(x[1:]) > 0, f"the bottom of shape {x} has nothing to take windows of")
        if self.param.pooling_param.global_pooling:
            self.pool = Pool((x[2], x[3]), (1, 1))
        self.possible((*x[:2], *(n + 2 * p for n, p in zip(x[2:], self.pool.pad, strict=True))), "the bottom with its pad")
        sizes = self.pool.sizes(x[2:])
        self.require(min(sizes) > 0, f"the kernel {self.pool.kernel} does not fit into the bottom of shape {x}")
        return [(*x[:2], *sizes)] * max(len(self.param.top), 1)

    @property
    def averages(self) -> bool:
        """Whether the top holds means."""
        return self.param.pooling_param.pool == caffe_pb2.PoolingParameter.AVE

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.averages:
            return self.pool.average(x)
        y, index = self.pool.maximum(x)
        return [y, index.to(x.dtype)] if len(self.param.top) > 1 else y


@layer("SPP")
class SPP(Layer):
    """Spatial pyramid pooling: level i pools into 2^i x 2^i bins; the levels follow one another on axis 1.

    With one level the top keeps its four axes.  Caffe: spp_layer.cpp; He et al. 2014.
    """

    in_place = False

    def setup(self, x: Shape) -> None:
        p = self.param.spp_param
        self.require(p.pyramid_height > 0, "pyramid_height must be positive")
        self.require(p.pool != p.STOCHASTIC, "stochastic pooling is not implemented (Caffe has it on GPUs only); use MAX or AVE")

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.require(len(x) == 4, f"needs a blob of four axes (N, C, H, W), not {x}")
        self.require(min(x[1:]) > 0, f"the bottom of shape {x} has nothing to take windows of")
        self.levels = []
        for level in range(self.param.spp_param.pyramid_height):
            bins = 2 ** level
            kernel = (-(-x[2] // bins), -(-x[3] // bins))
            high, wide = ((k * bins - n + 1) // 2 for k, n in zip(kernel, x[2:], strict=True))
            self.levels.append(Pool(kernel, kernel, (high, wide)))
            self.require(high < kernel[0] and wide < kernel[1], f"the bottom of shape {x} is too small for {bins} x {bins} bins")
        if len(self.levels) == 1:
            return [(*x[:2], *self.levels[0].sizes(x[2:]))]
        return [(x[0], x[1] * sum(prod(pool.sizes(x[2:])) for pool in self.levels))]

    def forward(self, x: Tensor) -> Tensor:
        average = self.param.spp_param.pool == caffe_pb2.SPPParameter.AVE
        levels = [pool.average(x) if average else pool.maximum(x)[0] for pool in self.levels]
        return levels[0] if len(levels) == 1 else torch.cat([y.flatten(1) for y in levels], 1)
