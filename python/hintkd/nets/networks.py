"""The networks by the names that tables use: `student: {net: resnet, depth: 14}` is NETWORKS["resnet"](depth=14).

A network is a frozen dataclass that knows its title and writes itself into a net (experiment.Network); a family has a module of its own.
"""
from __future__ import annotations

from collections.abc import Callable

from hintkd.experiment import Network
from hintkd.nets.resnet import ResNet

NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet": ResNet,
}
