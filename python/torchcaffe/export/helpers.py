"""Parts of exported modules: torch_module.py copies the source text of those that a net needs into its file.

Each depends on torch, and on nothing else here.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file, by name."""
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: torch.frombuffer(data, dtype=torch.float32, count=math.prod(tensor["shape"]),
                                   offset=start + tensor["data_offsets"][0]).reshape(tensor["shape"])
            for name, tensor in header.items()}


class Affine(nn.Module):
    """x * weight + bias, either of which may be missing; `trailing` axes of x lie behind those that they span."""

    def __init__(self, shape: tuple[int, ...], trailing: int, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.place = (..., *[None] * trailing)
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            x = x * self.weight[self.place]
        return x if self.bias is None else x + self.bias[self.place]


class CaffePool2d(nn.Module):
    """Pooling with Caffe's windows, for settings where torch's are others.

    There are ceil((size + 2 pad - kernel) / stride) + 1 windows, or floor(...); with padding, a last one that would start behind the image
    is dropped.  Without, one may lie outside: its maximum is the lowest number.  An average counts the padding, not what lies beyond.
    """

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int], ceil: bool, average: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.pad, self.ceil, self.average = kernel, stride, pad, ceil, average

    def forward(self, x: Tensor) -> Tensor:
        around, divisors = [], []
        for i, size in enumerate(x.shape[2:]):
            kernel, stride, pad = self.kernel[i], self.stride[i], self.pad[i]
            span = size + 2 * pad - kernel
            windows = (-(-span // stride) if self.ceil else span // stride) + 1
            if any(self.pad) and (windows - 1) * stride >= size + pad:
                windows -= 1
            around.append((pad, (windows - 1) * stride + kernel - size - pad))
            divisors.append((size + 2 * pad - stride * torch.arange(windows, device=x.device)).clamp(max=kernel))
        padding = [*around[1], *around[0]]
        if not self.average:
            return F.max_pool2d(F.pad(x, padding, value=torch.finfo(torch.float32).min), self.kernel, self.stride)
        total = F.avg_pool2d(F.pad(x, padding), self.kernel, self.stride, divisor_override=1)
        return total / (divisors[0][:, None] * divisors[1])


class MaxPool2dWithMask(nn.MaxPool2d):
    """Maximum pooling, and the index of each maximum in its image."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, index = super().forward(x)
        return y, index.to(x.dtype)


def arg_max(x: Tensor, top_k: int, axis: int | None, values: bool) -> Tensor:
    """Places (or values) of the largest numbers along an axis, of equal ones the last first; without an axis, of each item."""
    rows, along = (x.flatten(1), 1) if axis is None else (x, axis)
    found, places = rows.flip(along).sort(dim=along, descending=True, stable=True)
    found, places = found.narrow(along, 0, top_k), (rows.shape[along] - 1 - places.narrow(along, 0, top_k)).to(x.dtype)
    if axis is not None:
        return found if values else places
    both = torch.stack([places, found] if values else [places], 1)
    return both.reshape(*both.shape, *[1] * (x.dim() - 3))


def standardise(x: Tensor, across_channels: bool, eps: float | None) -> Tensor:
    """Mean 0 and, unless eps is None, variance 1 of each channel or each item; x with four axes."""
    x = x.reshape(*x.shape, *[1] * (4 - x.dim()))
    over = (1, 2, 3) if across_channels else (2, 3)
    x = x - x.mean(over, keepdim=True)
    return x if eps is None else x / (x.square().mean(over, keepdim=True).sqrt() + eps)
