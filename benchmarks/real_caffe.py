"""A real Caffe's part of step.py: trains a solver prototxt's net by one iteration for every line of input, and answers with its seconds.

    python benchmarks/real_caffe.py solver.prototxt images.npy labels.npy

Runs in a process of its own, since a process has one `caffe`; needs no torch.
"""
from __future__ import annotations

import sys
import time

import caffe  # type: ignore[import-not-found]
import numpy as np


def main(solver_file: str, images: str, labels: str) -> None:
    caffe.set_mode_cpu()
    solver = caffe.get_solver(solver_file)
    solver.net.blobs["data"].data[...], solver.net.blobs["label"].data[...] = np.load(images), np.load(labels)
    for name, blobs in solver.net.params.items():            # a teacher that was never trained: statistics of 0 and 1
        if name.startswith("teacher/") and name.endswith("_bn"):
            blobs[1].data[...] = blobs[2].data[...] = 1
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        solver.step(1)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
