"""Networks by their titles, as papers' tables and command lines name them: wrn_40_2, resnet8x4, vgg13, ShuffleV1 ..."""
from __future__ import annotations

import re
from typing import Any

from hintkd.errors import UserError
from hintkd.nets.basic_resnet import BasicResNet, DeepResNet
from hintkd.nets.mobilenet import MobileNetV2
from hintkd.nets.pyramidnet import PyramidNet
from hintkd.nets.resnet import ResNet
from hintkd.nets.resnext import ResNeXt
from hintkd.nets.shufflenet import ShuffleV1, ShuffleV2
from hintkd.nets.vgg import VGG
from hintkd.nets.wide_resnet import WideResNet

FAMILIES: dict[str, Any] = {                # a pattern whose groups are the numbers that make the network
    r"resnet(\d+)(?:x(\d+))?": BasicResNet,
    r"resnet(\d+)-(\d+)-(\d+)-(\d+)": lambda depth, *widths: ResNet(depth, widths),
    r"ResNet(\d+)(?:-(\d+))?": DeepResNet,
    r"resnext(\d+)_(\d+)x(\d+)d": ResNeXt,
    r"pyramidnet(\d+)_(\d+)": PyramidNet,
    r"wrn_(\d+)_(\d+)(?:_(4))?": WideResNet,
    r"vgg(\d+)": VGG,
    r"MobileNetV2": MobileNetV2,
    r"ShuffleV1": ShuffleV1,
    r"ShuffleV2": ShuffleV2,
}


def network(title: str) -> Any:
    """The network of this title.  Raises UserError if there is none."""
    for pattern, family in FAMILIES.items():
        found = re.fullmatch(pattern, title)
        if found:
            return family(*(int(number) for number in found.groups() if number))
    raise UserError(f"there is no network {title!r}; there are resnet20, resnet8x4, ResNet50, wrn_16_2, vgg8 and others of these families, "
                    "MobileNetV2, ShuffleV1 and ShuffleV2")
