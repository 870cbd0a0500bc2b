"""The nets of step.py as somebody would write them for PyTorch by hand: modules, channels-last, eager, torch.optim.SGD.

What the engine's step is measured against.  Weights come from the engine's net, so that both compute the same numbers.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
TAU, LAMBDA = 3.0, 5.0


class Unit(nn.Module):
    """3x3 convolution and BatchNorm."""

    def __init__(self, before: int, width: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width, momentum=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Block(nn.Module):
    """A residual module; where the size changes, the shortcut takes every second pixel and adds channels of zeros (He et al., option A)."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.stride, self.more = stride, width - before
        self.first, self.second = Unit(before, width, stride), Unit(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x), inplace=True))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
        return F.relu(x + y, inplace=True)


class ResNet(nn.Module):
    """He et al.'s CIFAR net of depth 6n + 2."""

    def __init__(self, depth: int, widths: tuple[int, int, int] = (16, 32, 64), classes: int = 10, channels: int = 3):
        super().__init__()
        n, before = (depth - 2) // 6, widths[0]
        self.first = Unit(channels, before)
        self.units = {"first_conv": self.first}              # by the names of hintkd's nets
        self.blocks = nn.Sequential()
        for group, width in enumerate(widths):
            for number in range(n):
                block = Block(before, width, 2 if group and not number else 1)
                self.blocks.append(block)
                self.units |= {f"group{group}_block{number}_conv0": block.first, f"group{group}_block{number}_conv1": block.second}
                before = width
        self.fc = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.first(x), inplace=True))
        return self.fc(x.mean(dim=(2, 3)))

    def load(self, params: Any, prefix: str = "") -> None:
        """Take the weights of a net with hintkd's names: {layer: blobs}, pycaffe's `net.params`."""
        places = [(self.fc.weight, "fc", 0), (self.fc.bias, "fc", 1)]
        for name, unit in self.units.items():
            places += [(unit.conv.weight, name, 0), (unit.bn.weight, name + "_scale", 0), (unit.bn.bias, name + "_scale", 1)]
        with torch.no_grad():
            for target, layer, index in places:
                target.copy_(torch.from_numpy(params[prefix + layer][index].data.copy()))


def training_step(student: ResNet, teacher: ResNet | None, images: Tensor, labels: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """A function that trains for one iteration on the batch, (n, channels, height, width) and (n,), and returns its loss.

    It runs where the images are; `compiled`: what comes before the update is compiled by torch.compile.
    """
    student.to(images.device, memory_format=torch.channels_last).train()
    if teacher is not None:
        teacher.to(images.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), RATE, MOMENTUM, weight_decay=DECAY, foreach=True)

    def loss_of(x: Tensor) -> Tensor:
        scores = student(x)
        loss = F.cross_entropy(scores, labels)
        if teacher is not None:
            with torch.no_grad():
                soft = F.softmax(teacher(x) / TAU, dim=1)
            loss = loss - LAMBDA * (soft * F.log_softmax(scores / TAU, dim=1)).sum(dim=1).mean()
        return loss

    differentiable = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step() -> Tensor:
        loss = differentiable(images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step
