"""Convolutions with the BatchNorm and Scale behind them folded into their weights.

Where stored statistics are used and nothing is learned, as in a teacher inside a student's net and in every TEST net,
BatchNorm and Scale are one factor and one shift per channel.  They cost nothing once they are part of the convolution.  Nor do a
ReLU and the sum at the end of a residual block, which oneDNN and cuDNN compute while a convolution's top is still in the registers.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe import glog
from torchcaffe.graph.build import Node
from torchcaffe.layers.layout import channels_last
from torchcaffe.layers.norm import BatchNorm
from torchcaffe.layers.vision import Convolution
from torchcaffe.step.dense import Dense

FULL_BATCH = 16                         # from here on torch gives every convolution to oneDNN, so that both ways round alike


def is_plain_scale(node: Node) -> bool:
    """Scale by gamma and beta, one of each per channel."""
    p = node.layer.param.scale_param
    return node.layer.type == "Scale" and len(node.bottoms) == 1 and p.axis == 1 and p.num_axes == 1 and p.bias_term


def is_plain_relu(node: Node) -> bool:
    """ReLU without a negative slope."""
    return node.layer.type == "ReLU" and node.layer.param.relu_param.negative_slope == 0


def foldable(chain: list[Node]) -> bool:
    """Whether Folded can compute these layers, which follow each other in place: Convolution, BatchNorm, Scale[, ReLU]."""
    if not 3 <= len(chain) <= 4:
        return False
    convolution, norm = chain[0].layer, chain[1].layer
    return (isinstance(convolution, Convolution) and convolution.channel_axis == 1 and len(chain[0].bottoms) == 1
            and isinstance(norm, BatchNorm) and norm.stored and is_plain_scale(chain[2]) and all(map(is_plain_relu, chain[3:])))


class Folded:
    """y = [relu](convolution(x, w g) + b), with g = gamma / sqrt(variance + eps) and b = beta - (mean - bias) g per output channel."""

    def __init__(self, chain: list[Node]):
        convolution, norm = chain[0].layer, chain[1].layer
        assert isinstance(convolution, Convolution) and isinstance(norm, BatchNorm)
        self.convolution, self.norm, self.scale, self.relu = convolution, norm, chain[2].layer, len(chain) == 4
        context = convolution.context
        self.on_gpu = context.device.type == "cuda"
        known = (torch.backends.cudnn.is_available() and not convolution.subsamples if self.on_gpu
                 else torch.backends.mkldnn.is_available() and context.precision == "fp32")
        self.fuses = known and context.dtype == torch.float32 and convolution.spatial == 2
        self.kind = torch.bfloat16 if self.on_gpu and context.precision == "bf16" else context.dtype     # autocast would convert every time
        self.geometry = convolution.pad, convolution.stride, convolution.dilation, convolution.param.convolution_param.group
        self.weight: Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        """Fold the parameters as they are now."""
        mean, variance = self.norm.statistics()
        gamma, beta = (p.detach() for p in self.scale.params)
        weight, *bias = (p.detach() for p in self.convolution.params)
        gain = gamma * (variance + self.norm.eps).rsqrt()
        folded = weight * gain.reshape(-1, *[1] * (weight.dim() - 1)), beta - (mean - bias[0] if bias else mean) * gain
        if self.weight is None:
            self.weight, self.bias = (x.to(self.kind) for x in folded)
        else:                                               # in their place, which a recorded pass reads
            self.weight.copy_(folded[0])
            self.bias.copy_(folded[1])

    def fused(self, x: Tensor, other: Tensor | None = None, relu: bool = True) -> Tensor | None:
        """relu(convolution(x) + b), or [relu](convolution(x) + b + other), over `other` on a CPU, in one kernel; None if there is none."""
        if not self.fuses or self.convolution.context.traced:
            return None
        x = channels_last(x)
        if self.on_gpu:
            return self._by_cudnn(x, other) if relu else None
        if len(x) < FULL_BATCH:
            return None
        y: Tensor
        if other is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "relu", [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(other, x, self.weight, self.bias, *self.geometry, "add", 1.0,
                                                                "relu" if relu else None, [], "")
        return y

    def _by_cudnn(self, x: Tensor, other: Tensor | None) -> Tensor | None:
        """With ReLU; None, and never asked again, if cuDNN refuses."""
        pad, stride, dilation, group = self.geometry
        assert self.weight is not None
        x = x.to(self.kind)
        try:
            if other is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, stride, pad, dilation, group)
            return torch.cudnn_convolution_add_relu(x, self.weight, other.to(self.kind), 1, self.bias, stride, pad, dilation, group)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.fuses = False
            why = str(error).splitlines()[0]
            glog.warning(f"layer '{self.convolution.name}' is computed without what follows it: {why}", "folding.py:1")
            return None

    def __call__(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        y = self.fused(x) if self.relu else None
        if y is not None:
            return y
        y = self.convolution.convolve(x, self.weight, self.bias)
        return F.relu_(y) if self.relu else y


class FoldedDense(Folded):
    """The same of very small images, as one product with a matrix (dense.py)."""

    def __init__(self, chain: list[Node]):
        self.dense = Dense(chain[0])
        super().__init__(chain)
        self.fuses = self.convolution.context.dtype == torch.float32

    def refresh(self) -> None:
        super().refresh()
        assert self.weight is not None
        self.matrix, self.row = self.dense.matrix(self.weight), self.dense.bias(self.bias)

    def fused(self, x: Tensor, other: Tensor | None = None, relu: bool = True) -> Tensor | None:
        if self.convolution.context.traced or x.shape[1:] != self.dense.bottom:
            return None
        y = self.dense.tops(torch.addmm(self.row, self.dense.rows(x), self.matrix))
        if other is not None:
            y.add_(other)
        return F.relu_(y) if relu else y

    def __call__(self, x: Tensor) -> Tensor:
        y = self.fused(x, relu=self.relu)
        return super().__call__(x) if y is None else y


class FoldedSum:
    """[relu](folded(x) + other), over `other` where oneDNN computes it."""

    def __init__(self, folded: Folded, relu: bool):
        self.folded, self.relu = folded, relu

    def refresh(self) -> None:
        """As Folded.refresh."""
        self.folded.refresh()

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.folded.fused(x, other, self.relu)
        if y is not None:
            return y
        y = self.folded(x).add_(other)
        return F.relu_(y) if self.relu else y
