#!/usr/bin/env python3
"""The peak memory of a training iteration against the sum of its activations.

    python benchmarks/memory.py                   measure into benchmarks/memory.json
    python benchmarks/memory.py --render          that into docs/performance.md

Activations are the blobs' data, layers in place counted once, copies by Split not at all.  The peak is what the process (or torch, on a
GPU) holds at most during iterations beyond what it held before the first one, when parameters, their history and the libraries are
there already: activations, what backward needs beside them, gradients, and the libraries' scratch memory.  Every figure comes from a
process of its own.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import common
import handwritten
import torchcaffe as caffe
from hintkd.nets.resnet import ResNet
from torchcaffe.step.memory import keep_freed

NETS = {"ResNet-8": (ResNet(8), None), "ResNet-8 {64, 128, 256}": (ResNet(8, common.WIDE), None),
        "ResNet-14, KD from a ResNet-26": (ResNet(14), ResNet(26)), "ResNet-56": (ResNet(56), None)}
WAYS = ("step", "layer by layer", "by hand")
ITERATIONS = 3


def held() -> int:
    """Bytes that this process holds, or that torch holds on the GPU."""
    if common.on_gpu():
        return torch.cuda.memory_allocated()
    return 1024 * _status("VmRSS")


def highest() -> int:
    """The most bytes that were held since start_watching()."""
    if common.on_gpu():
        return torch.cuda.max_memory_allocated()
    return 1024 * _status("VmHWM")


def start_watching() -> None:
    if common.on_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")        # resets VmHWM


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak(name: str, way: str) -> dict[str, int]:
    """Bytes of activations and of parameters, and the peak beyond what was held before the first iteration."""
    student, teacher = NETS[name]
    with TemporaryDirectory() as folder:
        trained = common.solver(common.net_message(student, teacher), Path(folder), fast=way == "step")
    common.feed(trained.net)
    parameters = sum(item.blob.count * item.blob.data_slot.dtype.itemsize for item in trained.learnable)
    result = {"activations": sum(common.activation_bytes(trained.net).values()), "parameters": parameters}
    step = lambda: trained.step(1)                           # noqa: E731
    if way == "by hand":
        keep_freed()
        device = trained.net.context.device
        mine, theirs = handwritten.ResNet(student.depth, student.widths), handwritten.ResNet(teacher.depth) if teacher else None
        images, labels = (torch.from_numpy(array).to(device) for array in common.records())
        step = handwritten.training_step(mine, theirs, images, labels.long())
    before = held()
    start_watching()
    for _ in range(ITERATIONS):
        step()
    if way == "step":
        common.require_recorded(trained)
    return {**result, "peak": highest() - before}


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Every net and way, each in a process of its own."""
    found: dict[str, dict[str, Any]] = {}
    for name in NETS:
        for way in WAYS:
            common.progress(f"  {name}: {way}")
            done = subprocess.run([sys.executable, __file__, "--one", name, way, args.device], check=True, text=True,
                                  stdout=subprocess.PIPE)
            found.setdefault(name, {})[way] = dict(zip(("activations", "parameters", "peak"), map(int, done.stdout.split()), strict=True))
    return {"nets": found}


def one(name: str, way: str, device: str) -> None:
    if device == "gpu":
        caffe.set_mode_gpu()
        torch.cuda.init()
    print(*peak(name, way).values())


# -- showing -----------------------------------------------------------------------------------------------------------------
def rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for name, found in run["nets"].items():
        for way, sizes in found.items():
            yield [name, way, *(f"{sizes[key] / 2**20:.0f}" for key in ("activations", "parameters", "peak")),
                   f"{sizes['peak'] / sizes['activations']:.2f}"]


def markdown(result: dict[str, Any]) -> str:
    """The measurement as a table and text."""
    run = result["runs"][0]
    return "\n".join([common.table(["net", "way", "activations, MiB", "parameters, MiB", "peak, MiB", "peak over activations"], *rows(run)),
                      common.evidence(result, f"batch {common.BATCH} of 3x32x32, float32, {run['threads']} thread(s)")])


def flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        common.main(__file__, __doc__, work, markdown, flags)
