"""Freed memory stays with the process: a second large tensor costs no page faults."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchcaffe.step import memory

PROGRAM = """
import resource, torch
from torchcaffe.step import memory

def faults(count, size):
    [torch.empty(size).fill_(1) for _ in range(count)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.empty(size).fill_(1) for _ in range(count)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(int(memory.keep_freed()), min(faults(COUNT, SIZE) for _ in range(8)))        # the kernel may take pages back meanwhile
"""


@pytest.mark.parametrize(("count", "size"), [(16, 2**20), (1, 2**24)])         # 64 MiB in small and large tensors
def test_large_tensors_reuse_memory_once_malloc_is_told(count, size):
    environment = {**os.environ, "PYTHONPATH": str(Path(memory.__file__).parents[1])}
    program = PROGRAM.replace("COUNT", str(count)).replace("SIZE", str(size))
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    told, faults = result.stdout.split()
    if told == "0":
        pytest.skip("this C library has no mallopt, or the environment sets it")
    assert int(faults) < 1600                               # of 16,384 pages


def test_a_user_s_own_setting_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not memory.keep_freed()
