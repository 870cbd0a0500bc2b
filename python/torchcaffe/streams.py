"""Random draws as functions of (seed, purpose, layer, pass).

There is no generator whose state has to be saved: whoever needs random numbers names what they are for, which layer asks, and
how often that layer has asked before.  So a resumed run, a prefetched batch or a net beside another draws the same numbers.
"""
from __future__ import annotations

import hashlib

import numpy as np
import torch


class Streams:
    """All random streams of one net, from one seed."""

    def __init__(self, seed: int):
        self.seed = seed

    def _key(self, purpose: str, layer: str, index: int) -> int:
        """128 bits that depend on every argument."""
        text = f"{self.seed}\0{purpose}\0{layer}\0{index}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    def numpy(self, purpose: str, layer: str, index: int = 0) -> np.random.Generator:
        """A numpy generator for host-side draws: fillers, augmentation, shuffling."""
        return np.random.Generator(np.random.Philox(key=self._key(purpose, layer, index)))

    def torch(self, purpose: str, layer: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator on `device`: dropout masks."""
        generator = torch.Generator(device)
        generator.manual_seed(self._key(purpose, layer, index) & (2**63 - 1))
        return generator
