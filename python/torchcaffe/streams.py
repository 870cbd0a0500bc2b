"""Random draws as functions of (seed, purpose, layer, pass).

There is no generator whose state has to be saved: whoever needs random numbers names what they are for, which layer asks, and
how often that layer has asked before.  So a resumed run, a prefetched batch or a net beside another draws the same numbers.  Solvers
that train together draw apart, except for what they must agree on.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcaffe import glog

WEYL = 0x9E3779B97F4A7C15 - 2**64                                       # as signed 64-bit integers, which is what torch has
FEW = 2**12                                                             # for which numpy's operations cost a third of torch's
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
        key, count = self._key(purpose, layer, 0) % 2**63, prod(shape)
        if isinstance(index, int) and count <= FEW and torch.device(device).type == "cpu":
            few = _drawn(np.arange(count), np.array([index]), key=key).astype(np.float32)
            return torch.from_numpy(few).mul_(2.0**-24).reshape(tuple(shape))
        now, numbers = torch.as_tensor(index, dtype=torch.int64, device=device), torch.arange(count, device=device)
        drawn = (_kernel() if numbers.is_cuda else None) or _drawn
        return drawn(numbers, now, key=key).to(torch.float32).mul_(2.0**-24).reshape(tuple(shape))

    def order(self, purpose: str, layer: str, index: Tensor, count: int) -> Tensor:
        """0 to count - 1 in an order for each pass in `index` (m,), the same on every device: (m, count) int64.

        The numbers are sorted by 64 bits that are drawn for each; nothing is drawn on the host.
        """
        key = self._key(purpose, layer, 0) % 2**63
        numbers = torch.arange(count, device=index.device)
        return mixed(numbers * WEYL + mixed(index[:, None] * WEYL + key)).argsort(dim=1, stable=True)


def _drawn(numbers: Any, now: Any, key: int) -> Any:
    """24 bits for each number of a pass, as int64; all of them tensors, or arrays."""
    return (mixed(numbers * WEYL + mixed(now * WEYL + key)) >> 40) & 0xFFFFFF


def mixed(z: Any) -> Any:
    """Each int64 scrambled; products wrap around, and shifts bring in zeros."""
    for shift, factor in MIX:
        z = (z ^ ((z >> shift) & (1 << (64 - shift)) - 1)) * factor
    return z ^ ((z >> 31) & (1 << 33) - 1)


# _drawn as CUDA compiles it, and any C++ compiler
CODE = f"""
template <typename T> T mixed(T number) {{
  unsigned long long z = number;
{"".join(f"  z = (z ^ z >> {shift}) * {factor % 2**64}ull;{chr(10)}" for shift, factor in MIX)}  return z ^ z >> 31;
}}
template <typename T> T drawn(T number, T pass, T key) {{
  const unsigned long long weyl = {WEYL % 2**64}ull;
  unsigned long long bits = mixed<T>(number * weyl + mixed<T>(pass * weyl + key));
  return bits >> 40;
}}
"""


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """_drawn as one CUDA kernel in the place of thirty, or None where torch cannot compile it; the numbers are the same."""
    kernel: Callable[..., Tensor] = torch.cuda.jiterator._create_jit_fn(CODE, key=0)
    try:
        kernel(*torch.zeros((2, 1), dtype=torch.int64, device="cuda"))
    except RuntimeError as error:
        glog.warning(f"random numbers take thirty kernels each: {str(error).splitlines()[0]}", "streams.py:1")
        return None
    return kernel
