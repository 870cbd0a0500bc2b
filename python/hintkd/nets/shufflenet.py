"""ShuffleNets for 32x32: V1 with three groups, V2 at width 1."""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.experiment import Options, Taps
from hintkd.nets.blocks import Blocks


@dataclass(frozen=True)
class ShuffleV1:
    """Zhang et al. 2018, g = 3, as RepDistiller's models/ShuffleNetv1.py: stem 1x1 of 24, stages of 240, 480, 960 in 4, 8, 4 units."""

    @property
    def title(self) -> str:
        return "ShuffleV1"

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b, widths, counts = Blocks(net, prefix, options.bn_fraction, torch_weights=True), (240, 480, 960), (4, 8, 4)
        before, size = (widths[begin - 1] if begin else 24), 32 >> begin
        blob = bottom if begin else b.conv_norm("conv1", bottom, 3, 24, 1)
        stem, modules, stages, below = blob, list[str](), list[str](), list[str]()
        for stage in range(begin, 3):
            for unit in range(counts[stage]):
                under = self._unit(b, f"layer{stage + 1}_{unit}", blob, before, widths[stage], size, first=unit == 0)
                blob = b.relu(under, apart=preacts and unit == counts[stage] - 1)
                before, size = widths[stage], size // 2 if unit == 0 else size
                modules.append(blob)
            stages.append(blob)
            below.append(under)
        pooled, logits = b.scores(blob, before, classes)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(below) if preacts else (), pooled=pooled, logits=logits,
                    stem=stem)

    @staticmethod
    def _unit(b: Blocks, name: str, bottom: str, before: int, width: int, size: int, first: bool) -> str:
        """Up to the last ReLU; the `first` of a stage halves the size and is joined with its bottom's average."""
        branch = width - before if first else width
        mid, group = branch // 4, 1 if before == 24 else 3
        narrow = b.conv_norm(name + "_conv1", bottom, before, mid, 1, group=group)
        shuffled = b.shuffle(name + "_shuffle", narrow, mid, group, size)
        deep = b.conv_norm(name + "_conv2", shuffled, mid, mid, 3, 2 if first else 1, group=mid)
        wide = b.conv_norm(name + "_conv3", deep, mid, branch, 1, group=3, relu=False)
        if first:
            return b.concat(name + "_joined", [wide, b.average_3x3(name + "_average", bottom, before)])
        return b.add(name + "_sum", wide, bottom)


@dataclass(frozen=True)
class ShuffleV2:
    """Ma et al. 2018 at width 1, as RepDistiller's models/ShuffleNetv2.py: stem 1x1 of 24, stages of 116, 232, 464, then 1x1 of 1,024.

    A preact is the last unit's two halves before ReLU and before the shuffle, so its channels come in another order than the stage's.
    """

    @property
    def title(self) -> str:
        return "ShuffleV2"

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """As experiment.Network says."""
        b, widths, counts = Blocks(net, prefix, options.bn_fraction, torch_weights=True), (116, 232, 464), (3, 7, 3)
        before, size = (widths[begin - 1] if begin else 24), 32 >> begin
        blob = bottom if begin else b.conv_norm("conv1", bottom, 3, 24, 1)
        stem, modules, stages, below = blob, list[str](), list[str](), list[str]()
        for stage in range(begin, 3):
            width, size = widths[stage], size // 2
            blob = self._down(b, f"layer{stage + 1}_0", blob, before, width, size)
            modules.append(blob)
            for unit in range(1, counts[stage] + 1):
                under, blob = self._unit(b, f"layer{stage + 1}_{unit}", blob, width, size, preacts and unit == counts[stage])
                modules.append(blob)
            before = width
            stages.append(blob)
            below.append(under)
        pooled, logits = b.scores(b.conv_norm("conv2", blob, before, 1024, 1), 1024, classes)
        return Taps(modules=tuple(modules), stages=tuple(stages), preacts=tuple(below) if preacts else (), pooled=pooled, logits=logits,
                    stem=stem)

    @staticmethod
    def _down(b: Blocks, name: str, bottom: str, before: int, width: int, size: int) -> str:
        mid = width // 2
        left = b.conv_norm(name + "_conv1", bottom, before, before, 3, 2, group=before, relu=False)
        left = b.conv_norm(name + "_conv2", left, before, mid, 1)
        right = b.conv_norm(name + "_conv3", bottom, before, mid, 1)
        right = b.conv_norm(name + "_conv4", right, mid, mid, 3, 2, group=mid, relu=False)
        right = b.conv_norm(name + "_conv5", right, mid, mid, 1)
        return b.shuffle(name + "_shuffle", b.concat(name + "_joined", [left, right]), width, 2, size)

    @staticmethod
    def _unit(b: Blocks, name: str, bottom: str, width: int, size: int, tapped: bool) -> tuple[str, str]:
        """The preact if it is tapped, and the unit's end."""
        mid = width // 2
        left, right = b.split(name + "_halves", bottom, width)
        right = b.conv_norm(name + "_conv1", right, mid, mid, 1)
        right = b.conv_norm(name + "_conv2", right, mid, mid, 3, group=mid, relu=False)
        under = b.conv_norm(name + "_conv3", right, mid, mid, 1, relu=False)
        right = b.relu(under, tapped)
        preact = b.concat(name + "_preact", [left, under]) if tapped else ""
        return preact, b.shuffle(name + "_shuffle", b.concat(name + "_joined", [left, right]), width, 2, size)
