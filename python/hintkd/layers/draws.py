"""Random numbers as functions of (seed, purpose, pass), for layers in any pycaffe: no generator has a state that would have to be saved.

They are those of torchcaffe's streams, so that both engines draw the same.  torchcaffe tells each layer its net's seed; for a real Caffe
the stage process says it.
"""
from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

WEYL = 0x9E3779B97F4A7C15 - 2 ** 64                          # as signed 64-bit integers, which numpy and torch both have
MIX = ((30, 0xBF58476D1CE4E5B9 - 2 ** 64), (27, 0x94D049BB133111EB - 2 ** 64))


_of_others = {"seed": 0}


def seed_others(seed: int) -> None:
    """What seed the layers of an engine have that tells them none, from now on."""
    _of_others["seed"] = seed


def seed_of(layer: Any) -> int:
    """The seed of a layer's net."""
    return int(getattr(layer, "seed", _of_others["seed"]))


def solver(engine: Any, what: str, alone: int) -> int:
    """caffe.solver_rank() or caffe.solver_count() of an engine, or what it is for one that trains alone where an engine has none."""
    known = getattr(engine, "solver_" + what, None)
    return int(known()) if known else alone


def key(seed: int, purpose: str, rank: int = 0) -> int:
    """63 bits that depend on all arguments; `rank` is a solver's number among those that train together and draw apart."""
    who = f"{seed} of solver {rank}" if rank else f"{seed}"
    digest = hashlib.blake2b(f"{who}\0{purpose}\0\0000".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little") % 2 ** 63


def mixed(z: Any) -> Any:
    """Each int64 of an array or tensor scrambled (the finishing steps of SplitMix64, Steele et al. 2014); products wrap around."""
    for shift, factor in MIX:
        z = (z ^ ((z >> shift) & (1 << (64 - shift)) - 1)) * factor
    return z ^ ((z >> 31) & (1 << 33) - 1)


def bits(drawn_from: int, now: Any, numbers: Any) -> Any:
    """64 bits for each of `numbers` (m,) of pass `now`, of the stream that a key names: int64 arrays or tensors of one element and m."""
    return mixed(numbers * WEYL + mixed(now * WEYL + drawn_from))


def fractions(found: Any) -> Any:
    """24 of the bits, as integers; times 2^-24 they are uniform in [0, 1)."""
    return (found >> 40) & 0xFFFFFF


def uniform(drawn_from: int, now: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers in [0, 1)."""
    found = fractions(bits(drawn_from, np.array([now]), np.arange(int(np.prod(shape)))))
    return (found.astype(np.float32) * np.float32(2.0 ** -24)).reshape(shape)


def order(drawn_from: int, now: int, count: int) -> np.ndarray:
    """0 to count - 1 in an order for pass `now`."""
    return np.argsort(bits(drawn_from, np.array([now]), np.arange(count)), kind="stable")
