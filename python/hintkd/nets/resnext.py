"""ResNeXt for 32x32: bottleneck blocks whose 3x3 convolution works in groups."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.basic_resnet import shortcut
from hintkd.nets.blocks import Blocks


@dataclass(frozen=True)
class ResNeXt:
    """Depth 9n + 2: stem of 64, three stacks of n blocks of 256, 512, 1024 channels, in each `cardinality` paths of `width` times 1, 2, 4.

    Xie et al. 2017, section 5.2: ResNeXt-29 8x64d is depth 29, cardinality 8, width 64.  The paths of a block are the groups of one 3x3
    convolution; where size or width changes the shortcut is a 1x1 convolution with BatchNorm.
    """
    depth: int = 29
    cardinality: int = 8
    width: int = 64

    def __post_init__(self) -> None:
        if self.depth < 11 or self.depth % 9 != 2 or min(self.cardinality, self.width) < 1:
            raise UserError(f"a ResNeXt of depth {self.depth} does not exist; depths are 9n + 2: 11, 20, 29, 38, ...")

    @property
    def title(self) -> str:
        return f"resnext{self.depth}_{self.cardinality}x{self.width}d"

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b, n = Blocks(net, prefix, options.bn_fraction), (self.depth - 2) // 9
        before = 64 if begin == 0 else 256 * 2 ** (begin - 1)
        blob = b.conv_norm("conv1", bottom, 3, 64) if begin == 0 else bottom
        stem, modules, stages, below = blob, list[str](), list[str](), list[str]()
        for group in range(begin, 3):
            for block in range(n):
                name, stride, tapped = f"layer{group + 1}_{block}", 2 if group and not block else 1, preacts and block == n - 1
                total = self._block(b, name, blob, before, group, stride)
                blob, before = b.relu(total, tapped), 256 * 2 ** group
                modules.append(blob)
            stages.append(blob)
            below.append(total)
        pooled, logits = b.scores(blob, before, classes)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(below) if preacts else (), pooled=pooled, logits=logits,
                    stem=stem)

    def _block(self, b: Blocks, name: str, bottom: str, before: int, group: int, stride: int) -> str:
        """What the last ReLU is given."""
        width, inner = 256 * 2 ** group, self.cardinality * self.width * 2 ** group
        first = b.conv_norm(name + "_conv1", bottom, before, inner, 1)
        second = b.conv_norm(name + "_conv2", first, inner, inner, 3, stride, group=self.cardinality)
        third = b.conv_norm(name + "_conv3", second, inner, width, 1, relu=False)
        return b.add(name + "_sum", third, shortcut(b, name, bottom, before, width, stride))
