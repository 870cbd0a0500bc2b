"""caffe.Timer: how long something took, the GPU's work included."""
from __future__ import annotations

import time

import torch


class Timer:
    """`ms` between start() and stop().  Caffe: util/benchmark.cpp."""

    def __init__(self) -> None:
        self.ms = 0.0
        self._begin = _now()

    def start(self) -> None:
        """Begin, or begin again."""
        self._begin = _now()

    def stop(self) -> None:
        """End; `ms` is the time since start() in milliseconds."""
        self.ms = (_now() - self._begin) * 1e3


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
