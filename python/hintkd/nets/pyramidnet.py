"""PyramidNets for 32x32: bottleneck blocks that grow by as many channels each, and shortcuts without parameters."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.blocks import Blocks

EXPANSION = 4


@dataclass(frozen=True)
class PyramidNet:
    """Depth 9n + 2: stem of 16, three stacks of n bottlenecks; the k-th of all 3n is round(16 + k widening / 3n) wide, times 4 at its end.

    Han et al. 2017, equation 3 and figure 6d: BatchNorm, 1x1, BatchNorm, ReLU, 3x3, BatchNorm, ReLU, 1x1, BatchNorm, and no ReLU after the
    sum.  A shortcut is averaged over 2 x 2 pixels where the image shrinks, and has zeros in the channels that are new: a frozen
    convolution of weights 0 makes them.  Stages end in sums, so that there is no ReLU to tap before: preacts are the stages themselves.
    """
    depth: int
    widening: int

    def __post_init__(self) -> None:
        if self.depth < 11 or self.depth % 9 != 2 or self.widening < 1:
            raise UserError(f"a PyramidNet of depth {self.depth} does not exist; depths are 9n + 2: 11, 20, ..., 101, 110, ...")

    @property
    def title(self) -> str:
        return f"pyramidnet{self.depth}_{self.widening}"

    @property
    def n(self) -> int:
        """Blocks per stack."""
        return (self.depth - 2) // 9

    def width(self, block: int) -> int:
        """Of the bottleneck of the block of this number, counted from 1."""
        return round(16 + block * self.widening / (3 * self.n))

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b = Blocks(net, prefix, options.bn_fraction)
        before = EXPANSION * self.width(begin * self.n) if begin else 16
        blob = bottom if begin else b.conv_norm("conv1", bottom, 3, before, relu=False)
        stem, modules = blob, list[str]()
        for index in range(begin * self.n, 3 * self.n):
            group, block = divmod(index, self.n)
            blob = self._block(b, f"layer{group + 1}_{block}", blob, before, self.width(index + 1), 2 if group and not block else 1)
            before = EXPANSION * self.width(index + 1)
            modules.append(blob)
        stages = tuple(modules[self.n - 1::self.n])
        pooled, logits = b.scores(b.relu(b.norm(b.prefix + "bn_final", bottom=blob)), before, classes)
        return Taps(modules=tuple(modules), stages=stages, preacts=stages if preacts else (), pooled=pooled, logits=logits, stem=stem)

    @staticmethod
    def _block(b: Blocks, name: str, bottom: str, before: int, width: int, stride: int) -> str:
        normed = b.norm(f"{b.prefix}{name}_bn1", bottom=bottom)
        first = b.conv_norm(name + "_conv1", normed, before, width, 1)
        second = b.conv_norm(name + "_conv2", first, width, width, 3, stride)
        third = b.conv_norm(name + "_conv3", second, width, EXPANSION * width, 1, relu=False)
        straight = bottom if stride == 1 else b.average_2x2(name + "_pool", bottom)
        return b.add(name + "_sum", third, b.widened(name + "_wide", straight, before, EXPANSION * width))
