"""Random draws as functions of (seed, purpose, layer, pass).

There is no generator whose state has to be saved: whoever needs random numbers names what they are for, which layer asks, and
how often that layer has asked before.  So a resumed run, a prefetched batch or a net beside another draws the same numbers.  Solvers
that train together draw apart, except for what they must agree on.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

WEYL = 0x9E3779B97F4A7C15 - 2**64                                       # as signed 64-bit integers, which is what torch has
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class Streams:
    """All random streams of one net, from one seed, as the solver number `rank` draws them."""

    def __init__(self, seed: int, rank: int = 0):
        self.seed, self.rank = seed, rank

    @property
    def common(self) -> Streams:
        """The streams that are the same in all solvers that train together: first weights, the order of records."""
        return Streams(self.seed)

    def _key(self, purpose: str, layer: str, index: int) -> int:
        """128 bits that depend on every argument."""
        who = f"{self.seed} of solver {self.rank}" if self.rank else f"{self.seed}"
        text = f"{who}\0{purpose}\0{layer}\0{index}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    def numpy(self, purpose: str, layer: str, index: int = 0) -> np.random.Generator:
        """A numpy generator for host-side draws: fillers, shuffling."""
        return np.random.Generator(np.random.Philox(key=self._key(purpose, layer, index)))

    def uniform(self, purpose: str, layer: str, index: int | Tensor, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Float32 numbers in [0, 1), the same on every device: augmentation, dropout masks.

        `index` may lie in device memory, as a tensor of one int64: nothing is drawn on the host, so that a captured pass can draw.
        Number i of a pass is hash(hash(key, pass), i), with the finishing steps of SplitMix64 as the hash (Steele et al. 2014).
        """
        key = self._key(purpose, layer, 0) % 2**63
        start = mixed(torch.as_tensor(index, dtype=torch.int64, device=device) * WEYL + key)
        bits = mixed(torch.arange(prod(shape), device=device) * WEYL + start)
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).reshape(tuple(shape))


def mixed(z: Tensor) -> Tensor:
    """Each int64 scrambled; products wrap around, and shifts bring in zeros."""
    for shift, factor in MIX:
        z = (z ^ ((z >> shift) & (1 << (64 - shift)) - 1)) * factor
    return z ^ ((z >> 31) & (1 << 33) - 1)
