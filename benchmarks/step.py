#!/usr/bin/env python3
"""How fast an iteration is, beside the same iteration written by hand for PyTorch.

    python benchmarks/step.py [--pairs 31] [--threads 1 2] [--output benchmarks/step.json]     measure
    python benchmarks/step.py --render                                                         benchmarks/step.json into docs/performance.md

Four ways to train one net on one fixed batch take turns in one process: by hand (handwritten.py), torchcaffe's whole-iteration step,
torchcaffe layer by layer with no blob looked at, and with the data and diff of every blob looked at after every iteration.  A figure is
the median over the turns of the ratio to the hand-written iteration of the same turn.  In the same turns two rates are measured, so
that times of different machines can be compared.  Every thread count has a process of its own.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")          # before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import handwritten
import torchcaffe as caffe
from data_prep.split import Split, silent
from data_prep.write import write_dataset
from hintkd import nets
from hintkd.backend import caffe_pb2, environment, write_text
from hintkd.experiment import DATASETS, Experiment, Options, ResNet
from hintkd.record import commit
from hintkd.run_stage import machine

ROOT = Path(__file__).resolve().parents[1]
BATCH = 128
BARS = {"step": 1.05, "layers": 1.5, "looked": 2.0}
WAYS = {"hand": "by hand", "step": "step", "layers": "layer by layer", "looked": "layer by layer, all blobs looked at"}
DATA_BAR = 0.05
NETS = {"resnet8": "ResNet-8", "resnet14-kd": "ResNet-14, KD from a ResNet-26"}
BEGIN, END = "<!-- written by benchmarks/step.py -->", "<!-- end -->"
EXPERIMENT = Experiment(method="kd", dataset=DATASETS["cifar10"], student=ResNet(14), teacher=ResNet(26), options=Options(mean="none"),
                        tau=handwritten.TAU, lambda_=handwritten.LAMBDA)


# -- the nets ----------------------------------------------------------------------------------------------------------------
def net_message(name: str) -> caffe_pb2.NetParameter:
    """A training net of NETS, fed by Input layers "data" and "label"."""
    x = EXPERIMENT
    whole = nets.plain_net(x, ResNet(8), x.dataset) if name == "resnet8" else nets.kd_net(x, iterations=1000)
    net = caffe_pb2.NetParameter(name=name)
    net.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": [BATCH, *x.dataset.shape]}]})
    net.layer.add(name="label", type="Input", top=["label"], input_param={"shape": [{"dim": [BATCH]}]})
    net.layer.extend(layer for layer in whole.layer if layer.type != "Data")
    return net


def solver(net: caffe_pb2.NetParameter, folder: Path, fast: bool) -> Any:
    """A solver of the net, which it starts with seed 1, whatever the way it runs."""
    (folder / "net.prototxt").write_text(write_text(net))
    (folder / "solver.prototxt").write_text(write_text(caffe_pb2.SolverParameter(
        net=str(folder / "net.prototxt"), type="SGD", base_lr=handwritten.RATE, lr_policy="fixed", momentum=handwritten.MOMENTUM,
        weight_decay=handwritten.DECAY, random_seed=1, max_iter=10**6, snapshot_after_train=False)))
    result = caffe.get_solver(str(folder / "solver.prototxt"))
    result.fast = fast
    for name, blobs in result.net.params.items():            # a teacher that was never trained: statistics of 0 and 1
        if name.startswith("teacher/") and name.endswith("_bn"):
            blobs[1].data[...] = blobs[2].data[...] = 1
    return result


def ways(name: str, folder: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], object]]:
    """One function for each of WAYS that trains for one iteration, each with a net of its own."""
    message = net_message(name)

    def caffe_solver(fast: bool) -> Any:
        made = solver(message, folder, fast)
        made.net.blobs["data"].data[...], made.net.blobs["label"].data[...] = images, labels
        return made

    def by_hand() -> Callable[[], torch.Tensor]:
        student = handwritten.ResNet(8 if name == "resnet8" else 14)
        student.load(first.net.params)
        teacher = handwritten.ResNet(26) if name != "resnet8" else None
        if teacher is not None:
            teacher.load(first.net.params, "teacher/")
        return handwritten.training_step(student, teacher, torch.from_numpy(images), torch.from_numpy(labels).long())

    first = caffe_solver(fast=True)
    check, hand = by_hand(), by_hand()
    loss = "loss" if name == "resnet8" else nets.KD_LOSS
    for _ in range(3):
        first.step(1)
        np.testing.assert_allclose(first.net.blobs[loss].data.item(), check().item(), rtol=1e-3)      # it is the same net
    step, layers, looked = caffe_solver(fast=True), caffe_solver(fast=False), caffe_solver(fast=False)

    def look() -> None:
        looked.step(1)
        for blob in [*looked.net.blobs.values(), *(blob for blobs in looked.net.params.values() for blob in blobs)]:
            _ = blob.data, blob.diff
    return {"hand": hand, "step": lambda: step.step(1), "layers": lambda: layers.step(1), "looked": look}


# -- measuring ---------------------------------------------------------------------------------------------------------------
def rates() -> dict[str, tuple[Callable[[], object], float]]:
    """Two functions and their floating-point operations: a matrix product, and a convolution as ResNets have it."""
    a, b, size = torch.randn(1024, 1024), torch.randn(1024, 1024), 1024
    x = torch.randn(32, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    return {"sgemm": (lambda: a @ b, 2.0 * size**3), "conv": (lambda: F.conv2d(x, w, padding=1), 2.0 * x.numel() * w[0].numel())}


def seconds(function: Callable[[], object], times: int = 1) -> float:
    """Wall time of a call, the mean of so many."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def measure_net(name: str, pairs: int) -> dict[str, Any]:
    """Milliseconds per iteration of all WAYS and operations per second of the rates, `pairs` of each, and the net's operations."""
    random = np.random.default_rng(0)
    images, labels = random.standard_normal((BATCH, 3, 32, 32), np.float32), random.integers(0, 10, BATCH).astype(np.float32)
    with TemporaryDirectory() as folder:
        functions = ways(name, Path(folder), images, labels)
    known = rates()
    for function in (*functions.values(), *(function for function, _ in known.values())):
        seconds(function, times=3)
    with FlopCounterMode(display=False) as counter:
        functions["hand"]()
    order, ms, measured = list(functions), {way: list[float]() for way in functions}, {rate: list[float]() for rate in known}
    for _ in range(pairs):
        order.append(order.pop(0))                           # another one comes first each time
        for way in order:
            ms[way].append(1e3 * seconds(functions[way], times=2))
        for rate, (function, operations) in known.items():
            measured[rate].append(operations / seconds(function, times=3))
    return {"operations": counter.get_total_flops(), "ms": ms, "rates": measured}


def measure_data(pairs: int) -> dict[str, list[float]]:
    """The data layer's share of a ResNet-8's iterations, while records are read for the first time and later.

    Padded records as for CIFAR-10, random crops, mirror and mean file; the data layer's own forward pass is timed inside the step.
    """
    random, count = np.random.default_rng(0), (2 * pairs + 4) * BATCH
    train, test = (Split(random.integers(0, 256, (n, 3, side, side), np.uint8), random.integers(0, 10, n).astype(np.int32))
                   for n, side in ((count, 40), (100, 32)))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        write_dataset(folder, {"train": train, "test": test}, train.mean(), {"dataset": "noise"}, silent)
        dataset = replace(EXPERIMENT.dataset, train_lmdb=str(folder / "train_lmdb"), train_mean=str(folder / "train_mean.binaryproto"))
        trained = solver(nets.plain_net(replace(EXPERIMENT, options=Options()), ResNet(8), dataset), Path(temporary), fast=True)
        layer, spent = trained.net.layers[0], [0.0]
        read = layer.forward

        def timed() -> Any:
            start = time.perf_counter()
            tops = read()
            spent[0] += time.perf_counter() - start
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


def busy_seconds() -> float | None:
    """Processor time that everything on this machine has taken since it started; None where /proc does not say."""
    try:
        fields = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    except OSError:
        return None
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


def worker(threads: int, pairs: int) -> dict[str, Any]:
    """All measurements with one thread count, and how many cores other programs kept busy meanwhile."""
    caffe.set_threads(threads)
    before, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    result: dict[str, Any] = {"threads": threads, "nets": {name: measure_net(name, pairs) for name in NETS}, "data": measure_data(pairs)}
    after = busy_seconds()
    if before is not None and after is not None:
        result["other_cores"] = (after - before - (time.process_time() - own)) / (time.perf_counter() - start)
    return result


def measure(threads: list[int], pairs: int) -> dict[str, Any]:
    """The whole benchmark: a process for each thread count."""
    runs = []
    for count in threads:
        print(f"measuring on {count} thread(s)", file=sys.stderr)
        done = subprocess.run([sys.executable, __file__, "--worker", str(count), "--pairs", str(pairs)], check=True, stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": str(count), "GLOG_minloglevel": "2"})
        runs.append(json.loads(done.stdout))
    return {"pairs": pairs, "wait_policy": os.environ["OMP_WAIT_POLICY"], "date": datetime.now(UTC).date().isoformat(), "runs": runs,
            **machine(), **environment("torchcaffe", "cpu"), **commit()}


# -- showing -----------------------------------------------------------------------------------------------------------------
def spread(values: list[float], digits: str) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return f"{median(values):{digits}} ({low:{digits}} to {high:{digits}})"


def verdict(value: float, bar: float, shown: str) -> str:
    return f"{shown}: {'met' if value <= bar else 'missed'}"


def warnings(result: dict[str, Any]) -> list[str]:
    """What may have disturbed the figures."""
    found = [f"On {run['threads']} thread(s) other programs kept {run['other_cores']:.2f} cores busy: measure again on a quiet machine."
             for run in result["runs"] if run.get("other_cores", 0) > 0.1]
    if result["wait_policy"].lower() != "passive":
        found.append(f"OMP_WAIT_POLICY was {result['wait_policy']}, not passive.")
    if result["pairs"] < 25:
        found.append(f"Only {result['pairs']} turns: a trial of the program, not a measurement.")
    if result["dirty"]:
        found.append("The sources differed from the commit.")
    return found


def table(*rows: list[str]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def iteration_rows(run: dict[str, Any]) -> Iterator[list[str]]:
    """One row for each net and way."""
    for name, net in run["nets"].items():
        for way, title in WAYS.items():
            ms = net["ms"][way]
            ratios = [mine / hand for mine, hand in zip(ms, net["ms"]["hand"], strict=True)]
            judged = [spread(ratios, ".3f"), verdict(median(ratios), BARS[way], f"{BARS[way]:.2f}")] if way in BARS else ["1", ""]
            shares = [median(net["operations"] / (1e-3 * t) / rate for t, rate in zip(ms, measured, strict=True))
                      for measured in net["rates"].values()]
            yield [NETS[name], str(run["threads"]), title, f"{median(ms):.1f}", *judged, *(f"{share:.0%}" for share in shares)]


def data_rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for when, title in {"first": "read for the first time", "later": "read before"}.items():
        shares = run["data"][when]
        yield [str(run["threads"]), title, spread(shares, ".1%"), verdict(median(shares), DATA_BAR, f"{DATA_BAR:.0%}")]


def rate_row(run: dict[str, Any]) -> list[str]:
    known = [[value for net in run["nets"].values() for value in net["rates"][rate]] for rate in ("sgemm", "conv")]
    return [str(run["threads"]), *(f"{median(values) / 1e9:.0f} GFLOP/s" for values in known)]


def markdown(result: dict[str, Any]) -> str:
    """The measurement as tables and text."""
    runs = result["runs"]
    evidence = ("{machine}, {cpu}, {cores} cores, {instructions}; Python {python}, torch {torch}, {engine}, commit {commit:.7}, {date}; "
                "{pairs} turns of two iterations, batch 128 of 3x32x32, float32.\n").format_map({**result, "commit": str(result["commit"])})
    return "\n".join([
        table(["net", "threads", "way", "ms per iteration", "times by hand: median (quartiles)", "bar", "of sgemm", "of the convolution"],
              *(row for run in runs for row in iteration_rows(run))),
        table(["threads", "records", "data layer's share of a ResNet-8's iteration: median (quartiles)", "bar"],
              *(row for run in runs for row in data_rows(run))),
        table(["threads", "sgemm, 1024 x 1024", "64-channel 3x3 convolution, 32 images of 32x32"], *map(rate_row, runs)),
        evidence, *(f"**{warning}**\n" for warning in warnings(result))])


def rendered(page: str, result: dict[str, Any]) -> str:
    """The page with the measurement between its two marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{markdown(result)}{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31, help="turns; a measurement takes at least 25")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/step.json")
    parser.add_argument("--render", action="store_true", help="write benchmarks/step.json into docs/performance.md, and measure nothing")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.pairs)))
    elif args.render:
        page = ROOT / "docs/performance.md"
        page.write_text(rendered(page.read_text(), json.loads((ROOT / "benchmarks/step.json").read_text())))
    else:
        result = measure(args.threads, args.pairs)
        args.output.write_text(json.dumps(result) + "\n")
        print(markdown(result), end="")


if __name__ == "__main__":
    main()
