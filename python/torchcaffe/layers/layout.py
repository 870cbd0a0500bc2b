"""Memory layouts: nets of images are computed channels-last throughout, which torch's convolutions are fastest in.

Torch's own rules are not enough: where the bottoms of a sum or a concatenation differ in layout its result is row by row, every
layer behind it follows, and each convolution copies its bottom.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """x with its channels last in memory if it has four axes; a net is laid out as its first convolution's bottom is.

    One channel lies the same either way, but only strides that say so are recognised.
    """
    if x.dim() != 4:
        return x
    if x.shape[1] == 1 and x.is_contiguous():
        return x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether x has its channels last in memory, and would lie otherwise row by row."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def alike(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors in one layout: channels-last if one of them is."""
    return [channels_last(x) for x in tensors] if any(map(is_channels_last, tensors)) else tensors
