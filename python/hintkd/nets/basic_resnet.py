"""The zoo's ResNets of basic and of bottleneck blocks, with projections as shortcuts."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.blocks import Blocks

DEEP = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class BasicResNet:
    """Depth 6n + 2: stem of 16, three stacks of n basic blocks of 16, 32, 64 channels; times `wide` (resnet8x4) with a stem of 8 * wide.

    Where size or width changes the shortcut is a 1x1 convolution with BatchNorm, as in RepDistiller's models/resnet.py.
    """
    depth: int
    wide: int = 1

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2 or self.wide < 1:
            raise UserError(f"a ResNet of depth {self.depth} does not exist; depths are 6n + 2: 8, 14, 20, 26, 32, ...")

    @property
    def title(self) -> str:
        return f"resnet{self.depth}" + (f"x{self.wide}" if self.wide > 1 else "")

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b, n = Blocks(net, prefix, options.bn_fraction), (self.depth - 2) // 6
        widths = tuple(16 * self.wide * 2 ** group for group in range(3))
        before = (8 * self.wide if self.wide > 1 else 16) if begin == 0 else widths[begin - 1]
        blob = b.conv_norm("conv1", bottom, 3, before) if begin == 0 else bottom
        stem, modules, stages, below = blob, list[str](), list[str](), list[str]()
        for group in range(begin, 3):
            for block in range(n):
                tapped = preacts and block == n - 1
                stride = 2 if group and not block else 1
                total, blob = basic_block(b, f"layer{group + 1}_{block}", blob, before, widths[group], stride, tapped)
                before = widths[group]
                modules.append(blob)
            stages.append(blob)
            below.append(total)
        pooled, logits = b.scores(blob, before, classes)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(below) if preacts else (), pooled=pooled, logits=logits,
                    stem=stem)


@dataclass(frozen=True)
class DeepResNet:
    """ResNet-18 to -152 for 32x32: stem 3x3 of `width` at stride 1 without pooling, four stacks of 1, 2, 4, 8 times that.

    RepDistiller's models/resnetv2.py, where `width` is 64.  With bottlenecks, from depth 50 on, stacks end in four times as many channels.
    """
    depth: int
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"a ResNet of width {self.width} does not exist; widths are at least 1, and 64 in the source")
        if self.depth not in DEEP:
            raise UserError(f"there is no ResNet-{self.depth} of this kind; there are {', '.join(map(str, DEEP))}")

    @property
    def title(self) -> str:
        return f"ResNet{self.depth}" + (f"-{self.width}" if self.width != 64 else "")

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b, block, expansion = Blocks(net, prefix, options.bn_fraction), *((bottleneck, 4) if self.depth >= 50 else (basic_block, 1))
        before = self.width if begin == 0 else self.width * 2 ** (begin - 1) * expansion
        blob = b.conv_norm("conv1", bottom, 3, before) if begin == 0 else bottom
        stem, modules, stages, below = blob, list[str](), list[str](), list[str]()
        for group in range(begin, 4):
            for index in range(DEEP[self.depth][group]):
                tapped = preacts and index == DEEP[self.depth][group] - 1
                width = self.width * 2 ** group * expansion
                total, blob = block(b, f"layer{group + 1}_{index}", blob, before, width, 2 if group and not index else 1, tapped)
                before = width
                modules.append(blob)
            stages.append(blob)
            below.append(total)
        pooled, logits = b.scores(blob, before, classes)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(below) if preacts else (), pooled=pooled, logits=logits,
                    stem=stem)


def shortcut(b: Blocks, name: str, bottom: str, before: int, width: int, stride: int) -> str:
    if stride == 1 and before == width:
        return bottom
    return b.conv_norm(name + "_proj", bottom, before, width, 1, stride, relu=False)


def basic_block(b: Blocks, name: str, bottom: str, before: int, width: int, stride: int, apart: bool) -> tuple[str, str]:
    """Two 3x3 convolutions; what the last ReLU is given and what it makes."""
    inner = b.conv_norm(name + "_conv1", bottom, before, width, 3, stride)
    outer = b.conv_norm(name + "_conv2", inner, width, width, relu=False)
    total = b.add(name + "_sum", outer, shortcut(b, name, bottom, before, width, stride))
    return total, b.relu(total, apart)


def bottleneck(b: Blocks, name: str, bottom: str, before: int, width: int, stride: int, apart: bool) -> tuple[str, str]:
    """1x1 to a quarter of the width, 3x3 with the stride, 1x1 back; what the last ReLU is given and what it makes."""
    first = b.conv_norm(name + "_conv1", bottom, before, width // 4, 1)
    second = b.conv_norm(name + "_conv2", first, width // 4, width // 4, 3, stride)
    third = b.conv_norm(name + "_conv3", second, width // 4, width, 1, relu=False)
    total = b.add(name + "_sum", third, shortcut(b, name, bottom, before, width, stride))
    return total, b.relu(total, apart)
