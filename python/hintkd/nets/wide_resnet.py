"""Wide residual networks: BatchNorm and ReLU before each convolution."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.blocks import Blocks


@dataclass(frozen=True)
class WideResNet:
    """Depth 6n + 4: a convolution of 16, three stacks of n blocks of 16k, 32k, 64k channels (Zagoruyko and Komodakis 2016).

    With four `stacks`, the last of 128k channels, the depth is 8n + 4: the networks of Zhang et al. 2019 of depth 20, 28 and 44.

    The ends of stages are the raw sums, without BatchNorm and ReLU.  The preacts are these after the next stage's first BatchNorm, the
    last after the final one; where they are asked for, a second pair of layers shares that BatchNorm's parameters, whose statistics then
    move twice a pass, as in RepDistiller's models/wrn.py.
    """
    depth: int
    wide: int = 1
    stacks: int = 3

    def __post_init__(self) -> None:
        if self.stacks not in (3, 4):
            raise UserError(f"a wide ResNet of {self.stacks} stacks does not exist; there are those of 3 and of 4")
        if self.depth <= 4 or (self.depth - 4) % (2 * self.stacks) or self.wide < 1:
            each = 2 * self.stacks
            raise UserError(f"a wide ResNet of depth {self.depth} does not exist; depths are {each}n + 4: "
                            f"{', '.join(str(each * n + 4) for n in range(1, 7))}, ...")

    @property
    def title(self) -> str:
        return f"wrn_{self.depth}_{self.wide}" + ("_4" if self.stacks == 4 else "")

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b, n = Blocks(net, prefix, options.bn_fraction), (self.depth - 4) // (2 * self.stacks)
        before = 16 if begin == 0 else 16 * self.wide * 2 ** (begin - 1)
        blob = b.conv("conv1", bottom, 3, 16) if begin == 0 else bottom
        stem, modules, stages, below = blob, list[str](), list[str](), list[str]()
        for group in range(begin, self.stacks):
            width = 16 * self.wide * 2 ** group
            for block in range(n):
                first = f"block{group + 1}_{block}_bn1"
                if preacts and group > begin and not block:
                    below.append(b.norm(b.prefix + first + "_tap", first, blob))
                blob = self._block(b, f"block{group + 1}_{block}", blob, before, width, 2 if group and not block else 1,
                                   first if preacts and group > begin and not block else None)
                before = width
                modules.append(blob)
            stages.append(blob)
        if preacts:
            below.append(b.norm(b.prefix + "bn1_tap", "bn1", blob))
        blob = b.relu(b.norm(b.prefix + "bn1", "bn1" if preacts else None, blob))
        pooled, logits = b.scores(blob, before, classes, bias=False)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(below), pooled=pooled, logits=logits, stem=stem)

    @staticmethod
    def _block(b: Blocks, name: str, bottom: str, before: int, width: int, stride: int, shared: str | None) -> str:
        rectified = b.relu(b.norm(f"{b.prefix}{name}_bn1", shared, bottom))
        inner = b.conv_norm(name + "_conv1", rectified, before, width, 3, stride)
        outer = b.conv(name + "_conv2", inner, width, width)
        if before == width:
            return b.add(name + "_sum", bottom, outer)
        return b.add(name + "_sum", b.conv(name + "_proj", rectified, before, width, 1, stride), outer)
