"""MobileNetV2 for 32x32, half as wide."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.experiment import Options, Taps
from hintkd.nets.blocks import Blocks

SETTINGS = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
ENDS = (1, 2, 4, 6)                         # the settings after which a stage ends


@dataclass(frozen=True)
class MobileNetV2:
    """Inverted residuals (Sandler et al. 2018) at width 1/2 as RepDistiller has them: ReLU, not ReLU6, and an expansion even at 1.

    Stages end in linear layers, so that there is no ReLU to tap before: preacts are the stages themselves.
    """

    @property
    def title(self) -> str:
        return "MobileNetV2"

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b = Blocks(net, prefix, options.bn_fraction)
        start = ENDS[begin - 1] + 1 if begin else 0
        before = SETTINGS[start - 1][1] if begin else 16
        blob = bottom if begin else b.conv_norm("conv1", bottom, 3, 16, 3, 2)
        stem, modules, stages = blob, list[str](), list[str]()
        for setting in range(start, len(SETTINGS)):
            expansion, width, count, stride = SETTINGS[setting]
            for index in range(count):
                blob = self._block(b, f"block{setting}_{index}", blob, before, width, stride if index == 0 else 1, expansion)
                before = width
                modules.append(blob)
            if setting in ENDS:
                stages.append(blob)
        pooled, logits = b.scores(b.conv_norm("conv2", blob, before, 1280, 1), 1280, classes, std=0.01)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(stages) if preacts else (), pooled=pooled, logits=logits,
                    stem=stem)

    @staticmethod
    def _block(b: Blocks, name: str, bottom: str, before: int, width: int, stride: int, expansion: int) -> str:
        wide = before * expansion
        expanded = b.conv_norm(name + "_expand", bottom, before, wide, 1)
        deep = b.conv_norm(name + "_depthwise", expanded, wide, wide, 3, stride, group=wide)
        linear = b.conv_norm(name + "_project", deep, wide, width, 1, relu=False)
        return b.add(name + "_sum", linear, bottom) if stride == 1 and before == width else linear
