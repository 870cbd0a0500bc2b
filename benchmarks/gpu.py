#!/usr/bin/env python3
"""What has to be seen on a GPU itself: that a KD iteration is recorded and right, and what each way of saving kernels is worth.

    python benchmarks/gpu.py recorded|changes|profile|together [--output FILE]

All parts train a ResNet-14 under a ResNet-26 on prepared records of noise, with random crops, as table 1 does.  `recorded` checks, and
ends with status 1 if something is not as it should be; the others measure, and refuse to measure what is not recorded.  gpu_run.sh calls
them all.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch

import common
import torchcaffe as caffe
from hintkd.backend import environment
from hintkd.nets import stages as nets
from hintkd.study.record import commit
from torchcaffe import streams
from torchcaffe.graph import build
from torchcaffe.step import folding, statistics

PRECISIONS = ("fp32", "tf32", "bf16")
ITERATIONS = 300
CLOSE = 1e-3                                                # of a parameter's largest number, after three iterations in float32
Parameters = dict[str, list[np.ndarray]]


# -- training ----------------------------------------------------------------------------------------------------------------
class Trial:
    """Solvers of the KD net in a folder of their own, each from the same weights."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.net = nets.kd_net(common.noise(folder, 2000), iterations=1000)

    def solver(self, kind: torch.dtype = torch.float32, replay: bool = True, **settings: Any) -> Any:
        own = self.folder / f"{self.count}"
        own.mkdir()
        self.count += 1
        with caffe.number_type(kind):
            made = common.solver(self.net, own, **settings)
        made.exact, made.replay = True, replay
        return made


@contextmanager
def trial() -> Iterator[Trial]:
    with TemporaryDirectory() as folder:
        yield Trial(Path(folder))


def parameters(trained: Any) -> Parameters:
    return {name: [blob.data.astype(np.float64) for blob in blobs] for name, blobs in trained.net.params.items()}


def difference(one: Parameters, other: Parameters) -> float:
    """The largest difference, for each parameter as a part of its largest number."""
    pairs = [(a, b) for name in other for a, b in zip(one[name], other[name], strict=True)]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


# -- parts -------------------------------------------------------------------------------------------------------------------
def recorded() -> dict[str, Any]:
    """Recorded at all; three iterations against float64; led by the host; the same bytes again and after a resume; what cuDNN fuses."""
    with trial() as made:
        caffe.set_mode_cpu()
        exact = made.solver(torch.float64, replay=False)
        exact.step(3)
        caffe.set_mode_gpu()
        first, again, led = made.solver(), made.solver(), made.solver(replay=False)
        for trained in (first, again, led):
            trained.step(3)
        found: dict[str, Any] = {"recorded": first.is_recorded, "fused": fused(first),
                                 "against float64": difference(parameters(first), parameters(exact)),
                                 "led by the host": difference(parameters(first), parameters(led)),
                                 "again": difference(parameters(first), parameters(again))}
        whole, resumed = made.solver(), made.solver()
        whole.step(20)
        state = whole.snapshot()
        whole.step(20)
        try:
            resumed.restore(state)
            resumed.step(20)
            found["resumed"] = difference(parameters(whole), parameters(resumed))
        except caffe.SidecarError as error:
            found["resumed"] = str(error)
    fails = [name for name in ("again", "resumed") if found[name] != 0]
    fails += [name for name in ("against float64", "led by the host") if not found[name] < CLOSE]
    return {**found, "fails": fails if found["recorded"] else ["recorded", *fails]}


def fused(trained: Any) -> dict[str, Any]:
    """How many frozen convolutions cuDNN computes together with what follows, and how far that is from one by one, for one batch each."""
    runs = [op.run for op in trained._program(trained.net).operations]
    parts = [run.folded if isinstance(run, folding.FoldedSum) else run for run in runs]
    parts = [part for part in parts if isinstance(part, folding.Folded)]
    found: dict[str, Any] = {"convolutions": len(parts), "fused": sum(part.fuses for part in parts), "differences": []}
    for part in {part.convolution.declared[0][0]: part for part in parts}.values():          # one of each shape
        weight = part.weight
        x, other = (channels_last(torch.randn(128, n, 16, 16, device="cuda")) for n in (part.convolution.channels, weight.shape[0]))
        plain = part.convolution.convolve(x, weight, part.bias)
        if part.convolution.stride == (1, 1):
            together = part.fused(x, other)
            wanted = (plain + other).relu()
        else:
            together, wanted = part.fused(x), plain.relu()
        if together is not None:
            found["differences"].append(float((together - wanted).abs().max() / wanted.abs().max()))
    return found


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def unfused() -> Any:
    made = folding.Folded.__init__

    def init(self: folding.Folded, chain: list[Any]) -> None:
        made(self, chain)
        self.fuses = False
    return mock.patch.object(folding.Folded, "__init__", init)


# what each way of saving kernels is undone by
CHANGES: dict[str, Callable[[], Any]] = {
    "channels-last weights": lambda: mock.patch.object(build._Builder, "_layout", return_value=torch.contiguous_format),
    "convolutions fused by cuDNN": unfused,
    "statistics once a pass": lambda: mock.patch.object(statistics, "collects", return_value=False),
    "random numbers in one kernel": lambda: mock.patch.object(streams, "_kernel", return_value=None)}


def changes() -> dict[str, Any]:
    """Milliseconds of an iteration for each precision: as it is, without each of CHANGES, and without any."""
    found: dict[str, Any] = {"iterations": ITERATIONS, "ms": {}}
    ways = {"as it is": [], **{f"without {change}": [change] for change in CHANGES}, "without any": [*CHANGES]}
    with trial() as made:
        for precision in PRECISIONS:
            caffe.set_precision(precision)
            for name, undone in ways.items():
                with ExitStack() as stack:
                    for change in undone:
                        stack.enter_context(CHANGES[change]())
                    found["ms"].setdefault(precision, {})[name] = milliseconds(made.solver())
                common.progress(f"  {precision}, {name}: {found['ms'][precision][name][0]:.3f} ms")
    return found


def milliseconds(trained: Any) -> list[float]:
    """Of an iteration in each of three calls, the least first."""
    trained.step(2)
    common.require_recorded(trained)
    return sorted(1e3 * common.seconds(lambda: trained.step(ITERATIONS)) / ITERATIONS for _ in range(3))


def profile() -> dict[str, Any]:
    """The kernels of one replay and what each takes, in microseconds, beside the time from one replay to the next."""
    found: dict[str, Any] = {}
    with trial() as made:
        for precision in ("fp32", "tf32"):
            caffe.set_precision(precision)
            trained = made.solver()
            ms = milliseconds(trained)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                trained.step(1)
                torch.cuda.synchronize()
            kernels: dict[str, list[float]] = {}
            for event in seen.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    kernels.setdefault(event.name, []).append(event.device_time)
            if not kernels:
                sys.exit("the profiler saw no kernel")
            rows = sorted(([name, len(times), round(sum(times), 2)] for name, times in kernels.items()), key=lambda row: -row[2])
            found[precision] = {"ms": ms, "kernels": sum(row[1] for row in rows), "busy_us": sum(row[2] for row in rows), "by name": rows}
    return found


def together() -> dict[str, Any]:
    """Iterations per second, all together, of 1, 2, 4 and 8 students under one teacher in one recording."""
    found: dict[str, Any] = {}
    with trial() as made:
        for precision in ("fp32", "tf32"):
            caffe.set_precision(precision)
            for count in (1, 2, 4, 8):
                group = common.together([made.solver() for _ in range(count)])        # of one seed, so that the teacher is one
                seconds = median(common.seconds(lambda: group.step(100)) for _ in range(3))     # noqa: B023  called at once
                found.setdefault(precision, {})[count] = {"per_second": 100 * count / seconds, "shared": len(group.shared[0])}
    return found


PARTS = {part.__name__: part for part in (recorded, changes, profile, together)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu.py: torch finds no GPU here\n")
    caffe.set_mode_gpu()
    torch.cuda.init()
    found = {**PARTS[args.part](), **environment("torchcaffe", "gpu"), **commit()}
    if args.output:
        args.output.write_text(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if found.get("fails") else 0


if __name__ == "__main__":
    sys.exit(main())
