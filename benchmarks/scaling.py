#!/usr/bin/env python3
"""Whether an iteration costs what its arithmetic costs, and how the cores of a machine are best shared out.

    python benchmarks/scaling.py [--axes depth width batch students sharing] [--turns 3]      measure into benchmarks/scaling.json
    python benchmarks/scaling.py --render                                                     that into docs/performance.md

Along each axis a net grows from a ResNet-8 of batch 128: depth 6n + 2 for n = 1 to 18, widths 1 to 8 times {16, 32, 64}, batch 16 to
1024; and ResNet-14 students under a ResNet-26 teacher train 1 to 8 at a time (torchcaffe's solve_together).  A point's floor is what its
floating-point operations and bytes take at the rates of the machine; growth beyond the arithmetic's is how much more slowly than the
axis' first point an operation is done.  `sharing`: ResNet-8 stages side by side on all cores, as processes of 1, 2, 4 ... threads.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import common
from hintkd.nets.resnet import ResNet

DEPTHS, FACTORS, BATCHES, STUDENTS = (1, 2, 3, 5, 9, 18), (1, 2, 4, 8), (16, 32, 64, 128, 256, 512, 1024), (1, 2, 4, 8)
AXES = ("depth", "width", "batch", "students", "sharing")
BAR = 1.15                                                   # growth beyond the arithmetic's, at most
SHARING_SECONDS = 10


def points(axis: str) -> Iterator[tuple[str, int, Callable[[Path], Any]]]:
    """The points of an axis: a name, how many solvers train together, and what makes one of them in a folder."""
    def trained(student: ResNet, teacher: ResNet | None = None, batch: int = common.BATCH) -> Callable[[Path], Any]:
        def make(folder: Path) -> Any:
            made = common.solver(common.net_message(student, teacher, batch, folder if common.on_gpu() else None), folder)
            common.feed(made.net)
            return made
        return make
    if axis == "depth":
        yield from ((f"n = {n}: ResNet-{6 * n + 2}", 1, trained(ResNet(6 * n + 2))) for n in DEPTHS)
    elif axis == "width":
        yield from ((f"x{k}: {{{16 * k}, {32 * k}, {64 * k}}}", 1, trained(ResNet(8, (16 * k, 32 * k, 64 * k)))) for k in FACTORS)
    elif axis == "batch":
        yield from ((str(batch), 1, trained(ResNet(8), batch=batch)) for batch in BATCHES)
    else:
        yield from ((str(count), count, trained(ResNet(14), ResNet(26))) for count in STUDENTS)


def measure(axis: str, turns: int) -> list[dict[str, Any]]:
    """Milliseconds per iteration at each point, its operations and its bytes."""
    found = []
    for name, count, make in points(axis):
        with TemporaryDirectory() as folder:
            found.append({"point": name, **measure_point([make(Path(folder)) for _ in range(count)], turns)})
        common.progress(f"  {axis} {name}: {median(found[-1]['ms']):.1f} ms")
    return found


def measure_point(solvers: list[Any], turns: int) -> dict[str, Any]:
    """The same at one point, for solvers that train together or one alone."""
    work = [common.operations_of(trained) for trained in solvers]
    moved, first = sum(common.traffic(trained.net) for trained in solvers), solvers[0]
    step = first.step if len(solvers) == 1 else common.together(solvers).step
    step(1)
    if len(solvers) == 1:
        common.require_recorded(first)
    times = 100 if common.on_gpu() else 1
    return {"operations": {kind: sum(each[kind] for each in work) for kind in work[0]}, "moved": moved,
            "ms": [1e3 * common.seconds(lambda: step(times)) / times for _ in range(turns)]}


# -- sharing the cores -------------------------------------------------------------------------------------------------------
def stage(seconds: float) -> None:
    """Train a ResNet-8 from the start signal on for so long, and print how many iterations that were per second."""
    with TemporaryDirectory() as folder:
        trained = common.solver(common.net_message(ResNet(8)), Path(folder))
        common.feed(trained.net)
        trained.step(3)
        print("ready", flush=True)
        sys.stdin.readline()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            trained.step(1)
            count += 1
        print(count / (time.perf_counter() - start), flush=True)


def sharing(turns: int) -> list[dict[str, Any]]:
    """Iterations per second of all stages side by side, for every number of threads that divides the cores."""
    cores = len(os.sched_getaffinity(0))
    found: list[dict[str, Any]] = [{"threads": threads, "stages": cores // threads, "per_second": []}
                                   for threads in range(1, cores + 1) if cores % threads == 0]
    for _ in range(turns):
        for entry in found:
            environment = {**os.environ, "OMP_NUM_THREADS": str(entry["threads"])}
            children = [subprocess.Popen([sys.executable, __file__, "--stage", str(SHARING_SECONDS)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env=environment) for _ in range(entry["stages"])]
            for child in children:
                assert child.stdout and child.stdout.readline() == "ready\n"
            for child in children:                           # now all are ready
                assert child.stdin
                child.stdin.write("\n")
                child.stdin.flush()
            rate = sum(float(child.communicate()[0]) for child in children)
            entry["per_second"].append(rate)
            common.progress(f"  {entry['stages']} stage(s) of {entry['threads']} thread(s): {rate:.2f} iterations per second")
    return found


def work(args: argparse.Namespace) -> dict[str, Any]:
    """All axes with one thread count; the cores are shared out once, in the first process."""
    found: dict[str, Any] = {"turns": args.turns, "axes": {axis: measure(axis, args.turns) for axis in AXES[:4] if axis in args.axes}}
    if "sharing" in args.axes and args.device == "cpu" and args.worker == min(args.threads or [1]):
        found["sharing"] = sharing(args.turns)
    return found


# -- showing -----------------------------------------------------------------------------------------------------------------
def rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for axis, found in run["axes"].items():
        first = None
        for point in found:
            ms, total = median(point["ms"]), sum(point["operations"].values())
            first = first or ms / total
            growth, least = ms / total / first, common.floors(point["operations"], point["moved"], run["rates"])
            yield [axis, point["point"], str(run["threads"]), f"{ms:.1f}", f"{total / 1e9:.1f}", f"{total / ms / 1e6:.0f}",
                   f"{least['arithmetic']:.0f} + {least['memory']:.0f}", common.verdict(growth <= BAR, f"{growth:.2f}")]


def markdown(result: dict[str, Any]) -> str:
    """The measurement as tables and text."""
    parts = [common.table(["axis", "point", "threads", "ms per iteration", "GFLOP", "GFLOP/s", "floor: ms of arithmetic + of memory",
                           f"growth beyond the arithmetic's, at most {BAR}"], *(row for run in result["runs"] for row in rows(run)))]
    for run in result["runs"]:
        if "sharing" in run:
            parts.append(common.table(["stages side by side", "threads each", "iterations per second, all together"],
                                      *([str(e["stages"]), str(e["threads"]), f"{median(e['per_second']):.2f}"] for e in run["sharing"])))
    turns = result["runs"][0]["turns"]
    return "\n".join([*parts, common.rate_table(result), common.evidence(result, f"medians of {turns} turns, float32")])


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--stage", type=float, help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "--stage" in sys.argv:
        stage(float(sys.argv[-1]))
    else:
        common.main(__file__, __doc__, work, markdown, flags)
