"""Convolutions of very small images as products with one matrix, which has every weight in all of its places.

That multiplies by many zeros, but a matrix product is one short call where oneDNN looks up, rearranges and starts several kernels: for
images of 4x4 pixels it takes a third of the time, for 2x2 a fifth.  Which layers are computed so depends on their shapes alone.
"""
from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from torchcaffe.graph.build import Node
from torchcaffe.layers.vision import CONVOLVE, Convolution

LARGEST = 2**16                         # numbers in the matrix


def is_dense(node: Node) -> bool:
    """Whether a layer is a convolution that Dense computes: on a CPU, in full precision, of images of which each fits."""
    layer, context = node.layer, node.layer.context
    return (isinstance(layer, Convolution) and layer.spatial == 2 and layer.channel_axis == 1 and len(node.bottoms) == 1
            and context.device.type == "cpu" and context.precision == "fp32"
            and 0 < prod(node.bottoms[0].shape[1:]) * prod(node.tops[0].shape[1:]) <= LARGEST)


class Dense:
    """Y = X W for images as rows, X (N, H W C) and Y (N, H' W' C'), channels last, and W (H W C, H' W' C').

    Each number of W is a weight or 0, so that W is gathered from these, and their gradients from that of W.
    """

    def __init__(self, node: Node):
        layer = node.layer
        assert isinstance(layer, Convolution)
        self.bottom, self.top, self.weight = node.bottoms[0].shape[1:], node.tops[0].shape[1:], layer.weight_shape()
        count, dtype = prod(self.weight), layer.context.dtype
        matrix = self._numbers(layer, count)
        self._sources, self._uses = matrix.flatten(), _uses(matrix.flatten(), count)
        self._padded, self._gradients = torch.zeros(count + 1, dtype=dtype), torch.zeros(matrix.numel() + 1, dtype=dtype)
        self._weights, self._matrix = self._padded[1:], self._gradients[:-1].view(matrix.shape)

    def _numbers(self, layer: Convolution, count: int) -> Tensor:
        """For every place in W the number of its weight, from 1, or 0: what the layer makes of images of one pixel each."""
        channels, high, wide = self.bottom
        size = channels * high * wide
        pixels = torch.eye(size, dtype=torch.float64).reshape(size, high, wide, channels).permute(0, 3, 1, 2)
        numbers = torch.arange(1, count + 1, dtype=torch.float64).reshape(self.weight)
        tops = CONVOLVE[2](pixels, numbers, None, layer.stride, layer.pad, layer.dilation, layer.param.convolution_param.group)
        return tops.permute(0, 2, 3, 1).reshape(size, -1).round().long()

    def matrix(self, weight: Tensor) -> Tensor:
        """W."""
        self._weights.copy_(weight.reshape(-1))
        return self._padded.index_select(0, self._sources).view(self._matrix.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as rows; a view where channels are last in memory."""
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)

    def tops(self, rows: Tensor) -> Tensor:
        """Rows of tops as images."""
        channels, high, wide = self.top
        return rows.view(-1, high, wide, channels).permute(0, 3, 1, 2)

    def bottoms(self, rows: Tensor) -> Tensor:
        """Rows of bottoms as images."""
        channels, high, wide = self.bottom
        return rows.view(-1, high, wide, channels).permute(0, 3, 1, 2)

    def bias(self, bias: Tensor) -> Tensor:
        """A number per channel for every pixel of a top."""
        return bias.expand(self.top[1] * self.top[2], -1).reshape(-1)

    def gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Of the weights, from rows of the bottom and of the top's gradient."""
        torch.mm(x.t(), dy, out=self._matrix)
        return self._gradients.index_select(0, self._uses).view(-1, *self.weight).sum(0)


def _uses(sources: Tensor, count: int) -> Tensor:
    """Where each of `count` weights stands in W, as often as the most frequent one; for others the place behind W fills this up."""
    times = sources.bincount(minlength=count + 1)[1:]
    places = sources.argsort(stable=True)[len(sources) - int(times.sum()):]             # those of weight 1, of weight 2 ...
    owners = sources[places] - 1
    found = torch.full((int(times.max()), count), len(sources))
    found[torch.arange(len(places)) - (times.cumsum(0) - times)[owners], owners] = places
    return found.flatten()
