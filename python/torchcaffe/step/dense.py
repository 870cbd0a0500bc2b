"""Convolutions of very small images as products with one matrix, which has every weight in all of its places.

That multiplies by many zeros, but a matrix product is one short call where oneDNN looks up, rearranges and starts several kernels: for
images of 8x8 pixels it takes half the time, for 2x2 a fifth.  Which layers are computed so depends on their shapes alone.
"""
from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from torchcaffe.graph.build import Node
from torchcaffe.layers.layout import channels_last
from torchcaffe.layers.vision import CONVOLVE, Convolution

LARGEST = 2**16                         # numbers in the matrix


def is_dense(node: Node) -> bool:
    """Whether a layer is a convolution that Dense computes: on a CPU, in full precision, of images of which each fits."""
    layer, context = node.layer, node.layer.context
    return (isinstance(layer, Convolution) and layer.spatial == 2 and layer.channel_axis == 1 and len(node.bottoms) == 1
            and context.device.type == "cpu" and context.precision == "fp32"
            and 0 < prod(node.bottoms[0].shape[1:]) * prod(node.tops[0].shape[1:]) <= LARGEST)


class Dense:
    """Y = X W for images as rows, X (N, H W C) and Y (N, H' W' C'), channels last, and W (H W C, H' W' C')."""

    def __init__(self, node: Node):
        layer = node.layer
        assert isinstance(layer, Convolution)
        channels, high, wide = self.bottom = node.bottoms[0].shape[1:]
        self.top, self.weight_shape = node.tops[0].shape[1:], layer.weight_shape()
        size, count = channels * high * wide, prod(self.weight_shape)
        numbers = torch.arange(1, count + 1, dtype=torch.float64).reshape(self.weight_shape)
        pixels = torch.eye(size, dtype=torch.float64).reshape(size, high, wide, channels).permute(0, 3, 1, 2)
        found = CONVOLVE[2](pixels, numbers, None, layer.stride, layer.pad, layer.dilation, layer.param.convolution_param.group)
        self.places = found.permute(0, 2, 3, 1).reshape(-1).round().long()                  # in W: the number of a weight, 0 for none
        self.size = size
        dtype = layer.context.dtype
        self._numbered = torch.zeros(count + 1, dtype=dtype)
        # where in W each weight is, for as many times as the most frequent one; the others' are filled up with the number behind W
        order = self.places.argsort(stable=True)
        times = self.places.bincount(minlength=count + 1)
        most = int(times[1:].max())
        self._uses = torch.full((most, count), len(self.places))
        sources = order[int(times[0]):]
        which = self.places[sources] - 1
        nth = torch.arange(len(sources)) - (times[1:].cumsum(0) - times[1:])[which]
        self._uses[nth, which] = sources
        self._uses = self._uses.flatten()
        self._gradient = torch.zeros(len(self.places) + 1, dtype=dtype)

    def matrix(self, weight: Tensor) -> Tensor:
        """W."""
        self._numbered[1:].copy_(weight.reshape(-1))
        return self._numbered.index_select(0, self.places).view(self.size, -1)

    def rows(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as rows."""
        return channels_last(x).permute(0, 2, 3, 1).reshape(len(x), -1)

    def images(self, rows: Tensor) -> Tensor:
        """Rows of the top as images, channels last."""
        channels, high, wide = self.top
        return rows.view(-1, high, wide, channels).permute(0, 3, 1, 2)

    def bottoms(self, dy: Tensor, matrix: Tensor) -> Tensor:
        """The gradient of the bottom, from rows of the top's."""
        channels, high, wide = self.bottom
        return torch.mm(dy, matrix.t()).view(-1, high, wide, channels).permute(0, 3, 1, 2)

    def bias(self, bias: Tensor) -> Tensor:
        """A number per channel for every pixel of the top."""
        return bias.expand(self.top[1] * self.top[2], -1).reshape(-1)

    def gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Of the weights, from rows of the bottom and of the top's gradient."""
        torch.mm(x.t(), dy, out=self._gradient[:-1].view(self.size, -1))
        return self._gradient.index_select(0, self._uses).view(-1, prod(self.weight_shape)).sum(0).view(self.weight_shape)
