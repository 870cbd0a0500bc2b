"""VGG networks for 32x32 with BatchNorm."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.blocks import Blocks

CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class VGG:
    """Five blocks of 3x3 convolutions with biases, BatchNorm and ReLU, max-pooling after the first three only, one fully connected layer.

    RepDistiller's models/vgg.py.  The first block is the stem; the stages are the other four.
    """
    depth: int

    def __post_init__(self) -> None:
        if self.depth not in CONVOLUTIONS:
            raise UserError(f"there is no VGG-{self.depth}; there are {', '.join(map(str, CONVOLUTIONS))}")

    @property
    def title(self) -> str:
        return f"vgg{self.depth}"

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says; stage i is block i + 1, and the first one has block 0, too."""
        b, blob, ends, below = Blocks(net, prefix, options.bn_fraction), bottom, list[str](), list[str]()
        first = begin + 1 if begin else 0
        before = WIDTHS[first - 1] if first else 3
        for block in range(first, 5):
            if 1 <= block <= 3:
                blob = b.max_pool(f"pool{block - 1}", blob)
            for index in range(CONVOLUTIONS[self.depth][block]):
                last = index == CONVOLUTIONS[self.depth][block] - 1
                under = b.conv_norm(f"block{block}_{index}", blob, before, WIDTHS[block], bias=True, relu=False)
                blob, before = b.relu(under, apart=preacts and last and block > 0), WIDTHS[block]
            ends.append(blob)
            below.append(under)
        skip = 0 if begin else 1
        pooled, logits = b.scores(blob, before, classes, std=0.01)
        return Taps(modules=tuple(ends), stages=tuple(ends[skip:]), preacts=tuple(below[skip:]) if preacts else (), pooled=pooled,
                    logits=logits, stem=ends[0])
