"""Random numbers as functions: the same for equal arguments, unrelated for different ones, uniform."""
from __future__ import annotations

import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

from torchcaffe.streams import CODE, Streams

ARGUMENTS = [(1, "dropout", "drop1", 0), (2, "dropout", "drop1", 0), (1, "transform", "drop1", 0),
             (1, "dropout", "drop2", 0), (1, "dropout", "drop1", 1)]


def drawn(seed: int, purpose: str, layer: str, index: int, count: int = 100_000) -> np.ndarray:
    return Streams(seed).uniform(purpose, layer, index, (count,)).numpy()


def splitmix(state: int) -> int:
    """The finishing steps of SplitMix64 in Python's integers."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_uniform_is_the_hash_it_says_it_is():
    streams, weyl = Streams(5), 0x9E3779B97F4A7C15
    start = splitmix((streams._key("dropout", "it", 0) % 2**63 + 7 * weyl) % 2**64)
    wanted = [(splitmix((start + i * weyl) % 2**64) >> 40) / 2**24 for i in range(6)]
    assert streams.uniform("dropout", "it", 7, (2, 3)).flatten().tolist() == wanted


def test_a_pass_counted_in_a_tensor_draws_the_same():
    streams = Streams(3)
    assert torch.equal(streams.uniform("a", "b", 12, (5,)), streams.uniform("a", "b", torch.tensor(12), (5,)))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_what_a_gpu_compiles_draws_the_same(tmp_path):
    streams, (passed, count) = Streams(3), (12, 1000)
    key = streams._key("a", "b", 0) % 2**63
    (tmp_path / "drawn.cpp").write_text(CODE + f"""
#include <cstdio>
int main() {{ for (long i = 0; i < {count}; i++) std::printf("%ld\\n", drawn<long>(i, {passed}, {key})); }}""")
    subprocess.run([os.environ.get("CXX", "g++"), "-o", tmp_path / "drawn", tmp_path / "drawn.cpp"], check=True)
    found = subprocess.run([tmp_path / "drawn"], capture_output=True, text=True, check=True).stdout.split()
    assert [int(bits) / 2**24 for bits in found] == streams.uniform("a", "b", passed, (count,)).tolist()


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_numbers_are_uniform(arguments):
    x = drawn(*arguments)
    assert x.dtype == np.float32 and x.min() >= 0 and x.max() < 1
    cells = np.histogram(x, 50, (0, 1))[0]
    assert ((cells - 2000) ** 2 / 2000).sum() < 100                      # chi squared of 49 degrees: above 100 once in 40,000
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.02


def test_other_seeds_purposes_layers_and_passes_draw_unrelated_numbers():
    assert np.abs(np.corrcoef([drawn(*a) for a in ARGUMENTS]) - np.eye(len(ARGUMENTS))).max() < 0.02
