"""Random draws as functions of (seed, purpose, layer, pass).

There is no generator whose state has to be saved: whoever needs random numbers names what they are for, which layer asks, and
how often that layer has asked before.  So a resumed run, a prefetched batch or a net beside another draws the same numbers.  Solvers
that train together draw apart, except for what they must agree on.
"""
from __future__ import annotations

import hashlib

import numpy as np
import torch


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
        """A numpy generator for host-side draws: fillers, augmentation, shuffling."""
        return np.random.Generator(np.random.Philox(key=self._key(purpose, layer, index)))

    def torch(self, purpose: str, layer: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator on `device`: dropout masks."""
        generator = torch.Generator(device)
        generator.manual_seed(self._key(purpose, layer, index) & (2**63 - 1))
        return generator
