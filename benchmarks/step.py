#!/usr/bin/env python3
"""How fast an iteration is, beside the same iteration written by hand for PyTorch.

    python benchmarks/step.py [--pairs 31] [--threads 1 2] [--nets ...] [--ways ...] [--caffe-python PATH]
                                                                                           measure into benchmarks/step.json
    python benchmarks/step.py --render                                                     benchmarks/step.json into docs/performance.md

Ways to train one net on one fixed batch take turns in one process: by hand (handwritten.py), torchcaffe's whole-iteration step, both
compiled by torch.compile where there is a C++ compiler, torchcaffe layer by layer with no blob looked at, and with the data and diff of
every blob looked at after every iteration; and a real Caffe, where `import caffe` finds one, in this Python or in that of --caffe-python,
in a process of its own.  A figure is the median over the turns of the ratio to the hand-written iteration of the same turn.  In the same
turns two rates are measured, so that times of different machines can be compared.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import handwritten
from common import BATCH, ROOT, seconds
from hintkd.experiment import DATASETS
from hintkd.nets import stages as nets
from hintkd.nets.resnet import ResNet

TINY = (4, 8, 16)
NETS = {"resnet8": (ResNet(8), None), "resnet8-wide": (ResNet(8, common.WIDE), None), "resnet14-kd": (ResNet(14), ResNet(26)),
        "digits": (ResNet(8, TINY), None), "digits-kd": (ResNet(8, TINY), ResNet(20, TINY))}
TITLES = {"resnet8": "ResNet-8", "resnet8-wide": "ResNet-8 {64, 128, 256}", "resnet14-kd": "ResNet-14, KD from a ResNet-26",
          "digits": "digits: ResNet-8 {4, 8, 16}", "digits-kd": "digits: the same, KD from a ResNet-20"}
WAYS = {"hand": "by hand", "step": "step", "hand-compiled": "by hand, compiled", "compiled": "step, compiled", "layers": "layer by layer",
        "looked": "layer by layer, all blobs looked at", "caffe": "real Caffe"}
SLOW = {"layers", "looked", "caffe"}                         # not measured on the wide net unless asked for
WHOLE = {"hand", "step", "hand-compiled", "compiled"}        # ways that run an iteration as one function
KD = "resnet14-kd"
# (way, what it is compared with, net or None for all) -> at most so many times
BARS = {("step", "hand", "resnet8"): 1.0, ("step", "hand", "resnet8-wide"): 1.0, ("step", "hand", KD): 0.95,
        ("compiled", "hand-compiled", None): 1.0, ("compiled", "hand", KD): 0.85,
        ("layers", "hand", None): 1.5, ("looked", "hand", None): 2.0,
        ("step", "hand", "digits"): 1.0, ("step", "hand", "digits-kd"): 1.0,
        ("step", "caffe", "digits"): 1.2, ("step", "caffe", "digits-kd"): 1.2}
SHARE_BAR, DATA_BAR, THREADS_BAR = 0.55, 0.05, 1.05


def iterations(name: str, way: str) -> int:
    """How many in a turn: on a GPU so many that what a call costs besides, which training pays once in thousands, does not count."""
    if common.on_gpu():
        return 200 if way in WHOLE else 10
    return {"resnet8-wide": 1, "digits": 20, "digits-kd": 20}.get(name, 2)


def dataset(name: str) -> str:
    """Whose shape of image and size of batch a net has."""
    return "digits" if name.startswith("digits") else "cifar10"


# -- the ways ----------------------------------------------------------------------------------------------------------------
def ways(name: str, folder: Path, wanted: list[str], python: str = sys.executable) -> tuple[dict[str, Callable[[int], float]],
                                                                                            dict[str, Any]]:
    """For each way wanted a function that trains for so many iterations and returns the seconds of one, each with a net of its own.

    Beside them, by way, the solvers of those that have one.
    """
    student, teacher = NETS[name]
    data = DATASETS[dataset(name)]
    message = common.net_message(student, teacher, data.batch, folder if common.on_gpu() else None, data.name)
    images, labels = common.records(data.batch, data.shape)
    solvers: dict[str, Any] = {}

    def caffe_step(way: str, fast: bool, compiled: bool = False) -> Any:
        solvers[way] = common.solver(message, folder, fast, compiled)
        common.feed(solvers[way].net)
        return solvers[way]

    def by_hand(compiled: bool = False) -> Callable[[], torch.Tensor]:
        mine = handwritten.ResNet(student.depth, student.widths, channels=data.channels)
        mine.load(first.net.params)
        theirs = handwritten.ResNet(teacher.depth, teacher.widths, channels=data.channels) if teacher else None
        if theirs is not None:
            theirs.load(first.net.params, "teacher/")
        device = first.net.context.device
        return handwritten.training_step(mine, theirs, torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device),
                                         compiled)

    first = caffe_step("first", fast=True)
    check, loss = by_hand(), nets.KD_LOSS if teacher else "loss"
    made: dict[str, Callable[[int], object]] = {}
    made["hand"] = repeated(by_hand())
    if "hand-compiled" in wanted:
        made["hand-compiled"] = repeated(by_hand(compiled=True))
    for _ in range(3):
        first.step(1)
        np.testing.assert_allclose(first.net.blobs[loss].data.item(), check().item(), rtol=1e-3)      # it is the same net
    for way, compiled in {"step": False, "compiled": True}.items():
        if way in wanted:
            made[way] = caffe_step(way, fast=True, compiled=compiled).step      # as the training programs call it
    if "layers" in wanted:
        made["layers"] = repeated(partial(caffe_step("layers", fast=False).step, 1))        # as scripts do
    if "looked" in wanted:
        made["looked"] = repeated(looking(caffe_step("looked", fast=False)))
    timed: dict[str, Callable[[int], float]] = {way: partial(seconds_of_one, function) for way, function in made.items()}
    if "caffe" in wanted:
        timed["caffe"] = real_caffe(folder, images, labels, python)
    return {way: timed[way] for way in WAYS if way in timed}, solvers


def repeated(function: Callable[[], object]) -> Callable[[int], None]:
    def repeat(times: int) -> None:
        for _ in range(times):
            function()
    return repeat


def seconds_of_one(function: Callable[[int], object], times: int) -> float:
    return seconds(lambda: function(times)) / times


def looking(trained: Any) -> Callable[[], None]:
    def look() -> None:
        trained.step(1)
        for blob in [*trained.net.blobs.values(), *(blob for blobs in trained.net.params.values() for blob in blobs)]:
            _ = blob.data, blob.diff
    return look


def real_caffe(folder: Path, images: np.ndarray, labels: np.ndarray, python: str) -> Callable[[int], float]:
    """Iterations of the folder's solver by the caffe that the interpreter `python` imports."""
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    files = [folder / name for name in ("solver.prototxt", "images.npy", "labels.npy")]
    child = subprocess.Popen([python, ROOT / "benchmarks/real_caffe.py", *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=ROOT, env=environment_of_caffe())

    def line() -> str:
        assert child.stdout
        answer = child.stdout.readline()
        if not answer:
            raise SystemExit(f"step.py: the real Caffe's process ended (status {child.wait()}); what it said stands above")
        return answer

    def ask(times: int) -> float:
        assert child.stdin
        total = 0.0
        for _ in range(times):
            child.stdin.write("\n")
            child.stdin.flush()
            total += float(line())
        return total / times
    while line() != "ready\n":                               # Caffe may print something first
        pass
    return ask


def environment_of_caffe() -> dict[str, str]:
    """The environment of a real Caffe's process: it finds hintkd's Python layers."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])}


def no_caffe(python: str) -> str | None:
    """Why an interpreter has no caffe, in a line, or None where it has one."""
    try:
        done = subprocess.run([python, "-c", "import caffe; caffe.get_solver"], capture_output=True, text=True, check=False, cwd=ROOT,
                              env=environment_of_caffe())
    except OSError as error:
        return str(error.strerror)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"it ends with status {done.returncode}"])[-1]


def obstacle(args: argparse.Namespace) -> str | None:
    """Why nothing is measured as the flags ask for it: a caffe that was named is not there."""
    problem = no_caffe(args.caffe_python) if args.caffe_python else None
    return problem and f"--caffe-python {args.caffe_python} cannot import caffe: {problem}"


def impossible(device: str, python: str = sys.executable) -> dict[str, str]:
    """The ways that cannot be measured here, and why."""
    missing = {}
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        missing["compiled"] = missing["hand-compiled"] = f"there is no C++ compiler {compiler}"
    if python == sys.executable and importlib.util.find_spec("caffe") is None:
        missing["caffe"] = "`import caffe` finds none"
    elif problem := no_caffe(python):
        missing["caffe"] = f"`import caffe` fails: {problem}"
    elif device == "gpu":
        missing["caffe"] = "it is measured on CPUs only"
    return missing


# -- measuring ---------------------------------------------------------------------------------------------------------------
def measure_net(name: str, wanted: list[str], pairs: int, python: str = sys.executable) -> dict[str, Any]:
    """Milliseconds per iteration of the ways and operations per second of the rates, `pairs` of each, and the net's operations."""
    with TemporaryDirectory() as folder:
        functions, solvers = ways(name, Path(folder), wanted, python)
        for way, function in functions.items():
            common.progress(f"  {TITLES[name]}: {WAYS[way]}")
            function(3)
            if way in WHOLE & solvers.keys():
                common.require_recorded(solvers[way])
        data = DATASETS[dataset(name)]
        net = common.solver(common.net_message(*NETS[name], data.batch, dataset=data.name), Path(folder)).net
        moved, work = common.traffic(net), common.operations(lambda: functions["hand"](1))
        known = {rate: found for rate, found in common.rates().items() if rate != "copy"}
        order, ms, measured = list(functions), {way: list[float]() for way in functions}, {rate: list[float]() for rate in known}
        for turn in range(pairs):
            order.append(order.pop(0))                       # another one comes first each time
            for way in order:
                ms[way].append(1e3 * functions[way](iterations(name, way)))
            for rate, (function, amount) in known.items():
                measured[rate].append(amount / seconds(function, times=3))
            if turn % 10 == 9:
                common.progress(f"  {TITLES[name]}: {turn + 1} of {pairs} turns")
    found = {"operations": work, "moved": moved, "ms": ms, "rates": measured}
    if "step" in functions and not common.on_gpu():          # where calls return when the work is done
        found["convolutions"] = [1e3 * Convolutions.of(functions["step"]) for _ in range(9)]
    return found


class Convolutions(TorchDispatchMode):
    """Adds up the seconds that calls of convolutions take, forward and backward, with what is computed in the same call."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        results: list[Any] = []
        spent = seconds(lambda: results.append(func(*args, **(kwargs or {}))))
        if "convolution" in str(func):
            self.seconds += spent
        return results[0]

    @classmethod
    def of(cls, iterate: Callable[[int], object]) -> float:
        """What they take in one iteration."""
        with cls() as mode:
            iterate(1)
        return mode.seconds


def measure_data(pairs: int) -> dict[str, list[float]]:
    """The data layer's share of a ResNet-8's iterations, while records are read for the first time and later.

    Padded records as for CIFAR-10, random crops, mirror and mean file; the data layer's own forward pass is timed inside the step.
    """
    count = (2 * pairs + 4) * BATCH
    with TemporaryDirectory() as folder:
        x = replace(common.noise(Path(folder), count), student=ResNet(8))
        trained = common.solver(nets.plain_net(x), Path(folder))
        layer, spent = trained.net.layers[0], [0.0]
        read = layer.forward

        def timed() -> Any:
            tops = []
            spent[0] += seconds(lambda: tops.extend(read()))
            return tops

        layer.forward = timed
        shares: dict[str, list[float]] = {"first": [], "later": []}
        trained.step(2)
        for when in shares:
            for _ in range(pairs):
                spent[0] = 0.0
                total = 2 * seconds(lambda: trained.step(1), times=2)
                shares[when].append(spent[0] / total)
            while layer.cursor * BATCH < count:              # the rest of the records
                read()
    return shares


def work(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements with one thread count."""
    python = args.caffe_python or sys.executable
    missing = {way: why for way, why in impossible(args.device, python).items() if way in (args.ways or WAYS)}
    found: dict[str, Any] = {"pairs": args.pairs, "missing": missing, "nets": {}}
    for name in args.nets:
        wanted = [way for way in args.ways or WAYS if way not in missing and (args.ways or name != "resnet8-wide" or way not in SLOW)]
        found["nets"][name] = measure_net(name, wanted, args.pairs, python)
    if not args.ways and args.device == "cpu":
        common.progress("  the data layer")
        found["data"] = measure_data(args.pairs)
    return found


# -- showing -----------------------------------------------------------------------------------------------------------------
def ratios(net: dict[str, Any], way: str, other: str) -> list[float]:
    return [mine / theirs for mine, theirs in zip(net["ms"][way], net["ms"][other], strict=True)]


def bars(name: str, net: dict[str, Any], way: str) -> str:
    """What the bars for this net and way say, one after the other."""
    found = []
    for (judged, other, where), bar in BARS.items():
        if judged == way and where in (None, name) and other in net["ms"]:
            value = median(ratios(net, way, other))
            found.append(common.verdict(value <= bar, f"{bar:.2f}" if other == "hand" else f"{bar:.2f} of {WAYS[other]} ({value:.3f})"))
    return "; ".join(found)


def iteration_rows(run: dict[str, Any]) -> Iterator[list[str]]:
    """One row for each net and way."""
    for name, net in run["nets"].items():
        total = sum(net["operations"].values())
        floor = common.floors(net["operations"], net["moved"], {**{rate: median(values) for rate, values in net["rates"].items()},
                                                                "copy": run["rates"]["copy"]})
        least = " + ".join(f"{floor[what]:.0f}" if floor[what] >= 1 else f"{floor[what]:.2f}" for what in ("arithmetic", "memory"))
        for way in net["ms"]:
            shares = [median(total / (1e-3 * t) / rate for t, rate in zip(net["ms"][way], measured, strict=True))
                      for measured in (net["rates"]["sgemm"], net["rates"]["conv"])]
            judged = "1" if way == "hand" else common.spread(ratios(net, way, "hand"), ".3f")
            share = f"{shares[1]:.0%}"
            if name == "resnet8" and way == "step":
                share = common.verdict(shares[1] >= SHARE_BAR, f"{share}, at least {SHARE_BAR:.0%}")
            yield [TITLES[name], str(run["threads"]), WAYS[way], milliseconds(median(net["ms"][way])), judged, bars(name, net, way),
                   f"{shares[0]:.0%}", share, least]


def milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def thread_rows(runs: list[dict[str, Any]]) -> Iterator[list[str]]:
    """What more threads make of a step.  Tiny nets have one thread whatever they are given, so that the ratio is 1 but for noise."""
    one = next((run for run in runs if run["threads"] == 1), None)
    for run in runs:
        for name, net in run["nets"].items() if one and run is not one else ():
            if "step" in net["ms"] and "step" in one["nets"].get(name, {}).get("ms", {}):
                value = median(net["ms"]["step"]) / median(one["nets"][name]["ms"]["step"])
                yield [TITLES[name], str(run["threads"]), f"{value:.2f}", common.verdict(value <= THREADS_BAR, f"{THREADS_BAR:.2f}")]


def convolution_rows(run: dict[str, Any]) -> Iterator[list[str]]:
    """How much of a step the calls of convolutions are: what no way of calling them saves."""
    for name, net in run["nets"].items():
        if any(net.get("convolutions", [])):                 # tiny nets have products of matrices in their place
            alone, whole, hand = (median(times) for times in (net["convolutions"], net["ms"]["step"], net["ms"]["hand"]))
            yield [TITLES[name], str(run["threads"]), milliseconds(alone), f"{alone / whole:.0%}", f"{alone / hand:.2f}"]


def data_rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for when, title in {"first": "read for the first time", "later": "read before"}.items():
        shares = run.get("data", {}).get(when)
        if shares:
            yield [str(run["threads"]), title, common.spread(shares, ".1%"),
                   common.verdict(median(shares) <= DATA_BAR, f"{DATA_BAR:.0%}")]


def markdown(result: dict[str, Any]) -> str:
    """The measurement as tables and text."""
    runs = result["runs"]
    turns = ("200 iterations from records on the device (10 layer by layer)" if result["device"] == "gpu"
             else "two iterations (one of the wide net)")
    digits = ", of digits 20, batch 32 of 1x8x8" if any(dataset(name) == "digits" for run in runs for name in run["nets"]) else ""
    data, pairs = [row for run in runs for row in data_rows(run)], runs[0]["pairs"]
    threads = list(thread_rows(runs)) if result["device"] == "cpu" else []
    convolutions = [row for run in runs for row in convolution_rows(run)]
    missing = sorted({f"Not measured: {WAYS[way]}, because {why}." for run in runs for way, why in run["missing"].items()})
    if pairs < 25:
        missing.append(f"**Only {pairs} turns: a trial of the program, not a measurement.**")
    return "\n".join([
        common.table(["net", "threads", "way", "ms per iteration", "times by hand: median (quartiles)", "bar: at most", "of sgemm",
                      "of the convolution", "floor: ms of arithmetic + of memory"], *(row for run in runs for row in iteration_rows(run))),
        *([common.table(["net", "threads", "ms in calls of convolutions", "of the step", "times by hand"], *convolutions)]
          if convolutions else []),
        *([common.table(["net", "threads", "step: times that of one thread", "bar: at most"], *threads)] if threads else []),
        *([common.table(["threads", "records", "data layer's share of a ResNet-8's iteration: median (quartiles)", "bar"], *data)]
          if data else []),
        common.rate_table(result), *(f"{line}\n" for line in missing),
        common.evidence(result, f"{pairs} turns of {turns}, batch {BATCH} of 3x32x32{digits}, float32")])


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=31, help="turns; a measurement takes at least 25")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[], help="all that make sense, with the data layer")
    parser.add_argument("--caffe-python", metavar="PATH", help="an interpreter that can import a real Caffe, which is measured in it")


if __name__ == "__main__":
    common.main(__file__, __doc__, work, markdown, flags, obstacle)
