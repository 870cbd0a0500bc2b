"""The networks by the names that tables use: `student: {net: resnet, depth: 14}` is NETWORKS["resnet"](depth=14).

A network is a frozen dataclass that knows its title and writes itself into a net (experiment.Network); a family has a module of its own.
"""
from __future__ import annotations

from collections.abc import Callable

from hintkd.experiment import Network
from hintkd.nets.basic_resnet import BasicResNet, DeepResNet
from hintkd.nets.mobilenet import MobileNetV2
from hintkd.nets.pyramidnet import PyramidNet
from hintkd.nets.resnet import ResNet
from hintkd.nets.resnext import ResNeXt
from hintkd.nets.shufflenet import ShuffleV1, ShuffleV2
from hintkd.nets.vgg import VGG
from hintkd.nets.wide_resnet import WideResNet

NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet": ResNet,
    "basic-resnet": BasicResNet,
    "deep-resnet": DeepResNet,
    "resnext": ResNeXt,
    "wrn": WideResNet,
    "pyramidnet": PyramidNet,
    "vgg": VGG,
    "mobilenet-v2": MobileNetV2,
    "shufflenet-v1": ShuffleV1,
    "shufflenet-v2": ShuffleV2,
}
