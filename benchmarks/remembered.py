#!/usr/bin/env python3
"""What it saves that a teacher is asked once: an iteration that finds its scores in the file, one that writes them, and whole tables.

    python benchmarks/remembered.py [--pairs 25] [--threads 1 2] [--nets ...]      measure into benchmarks/remembered.json
    python benchmarks/remembered.py --render                                       benchmarks/remembered.json into docs/performance.md

Four solvers take turns in one process, on records of noise as many and as large as the data set's: the student alone, the student under
its teacher without a memory, the same while the file fills, and the same with a file that has every input.  A figure is the median over
the turns of a ratio within a turn.  What a table saves is counted, not measured: operations of all its stages, one net after the other.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import common
from common import seconds
from data_prep.split import Split, silent
from data_prep.write import write_dataset
from hintkd.backend import caffe_pb2
from hintkd.experiment import DATASETS, Dataset
from hintkd.methods.hint_2019 import SCHEDULES
from hintkd.methods.stage import Stage
from hintkd.nets import stages as nets
from hintkd.nets.resnet import ResNet
from hintkd.run.remembering import Memory
from hintkd.study.reproduce import Request
from hintkd.study.table import find_table
from torchcaffe.step import frontier
from torchcaffe.step.remembered import LIMIT, WORD
from torchcaffe.step.table import Table

NETS = {"mnist": ("mnist", ResNet(8), ResNet(32)), "cifar10": ("cifar10", ResNet(14), ResNet(26)),
        "cifar10-wide": ("cifar10", ResNet(14), ResNet(26, (32, 64, 128)))}
TITLES = {"mnist": "MNIST, ResNet-8 under ResNet-32 (table 3)", "cifar10": "CIFAR-10, ResNet-14 under ResNet-26 (table 1)",
          "cifar10-wide": "CIFAR-10, ResNet-14 under ResNet-26 {32, 64, 128} (table 5)"}
WAYS = {"student": "student alone", "kd": "under its teacher, no memory", "filling": "the file fills", "full": "the file is full"}
AGAINST = {"filling": ("kd", 1.03), "full": ("student", 1.05)}          # way -> what it is compared with, and at most so many times
ITERATIONS = {"mnist": 8, "cifar10": 5, "cifar10-wide": 3}              # in a turn
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6")
BACKWARD = 2                                                             # a backward pass takes twice a forward pass's operations
CHUNK = 2**18


# -- an iteration ------------------------------------------------------------------------------------------------------------
def noise(dataset: Dataset, folder: Path, count: int) -> Dataset:
    """A data set of `count` records of noise of the shape of this one's."""
    random = np.random.default_rng(0)
    channels, side = dataset.shape[0], dataset.size + 8 * dataset.crop
    train, test = (Split(random.integers(0, 256, (n, channels, s, s), np.uint8), random.integers(0, dataset.classes, n).astype(np.int32))
                   for n, s in ((count, side), (100, dataset.size)))
    write_dataset(folder, {"train": train, "test": test}, train.images[:1000].mean(0), {"dataset": "noise"}, silent)
    return replace(dataset, train_lmdb=str(folder / "train_lmdb"), train_mean=dataset.train_mean and str(folder / "train_mean.binaryproto"))


def ways(name: str, folder: Path) -> dict[str, Callable[[int], object]]:
    """For each way a function that trains for so many iterations."""
    dataset, student, teacher = NETS[name]
    x = replace(common.EXPERIMENT, dataset=noise(DATASETS[dataset], folder / "data", DATASETS[dataset].train_size), student=student,
                teacher=replace(common.TEACHER, network=teacher), options=replace(common.EXPERIMENT.options, mean="file"))
    alone, under = nets.plain_net(x), nets.kd_net(x, iterations=1000)
    made = {}
    for way in WAYS:
        solver = common.solver(alone if way == "student" else under, folder)
        solver.remember = str(folder / way) if way in AGAINST else None
        solver.step(1)
        if way == "full":
            fill(solver.memory)
        made[way] = solver.step
    return made


def fill(memory: Any) -> None:
    """Give every input whose scores are not known some."""
    for start in range(0, memory.count, CHUNK):
        numbers = torch.arange(start, min(start + CHUNK, memory.count))
        numbers = numbers[~memory.store.has(numbers)]
        memory.store.write(numbers, torch.randn(len(numbers), 2 * memory.words, device=memory.device).view(torch.int64))


def measure_net(name: str, pairs: int) -> dict[str, list[float]]:
    """Milliseconds of an iteration of each way, `pairs` of each."""
    with TemporaryDirectory() as folder:
        common.progress(f"  {TITLES[name]}: records of noise, and a full file")
        functions, times = ways(name, Path(folder)), ITERATIONS[name]
        order, ms = list(functions), {way: list[float]() for way in functions}
        for turn in range(-1, pairs):                        # the first one warms up
            order.append(order.pop(0))                       # another one comes first each time
            for way in order:
                found = 1e3 * seconds(partial(functions[way], times)) / times
                if turn >= 0:
                    ms[way].append(found)
        return ms


# -- whole tables ------------------------------------------------------------------------------------------------------------
def saved(name: str, folder: Path) -> dict[str, float]:
    """Operations of a table's stages: "all" without a memory, "teachers" of these in frozen layers, and "asked" of those with a memory."""
    table = find_table(name)
    dataset = noise(table.dataset, folder / table.dataset.name, 2)
    stages = dict.fromkeys(stage for run in Request(table).runs() for stage in (*run.stages, *run.stages[-1].sources))
    found = {"all": 0.0, "teachers": 0.0, "asked": 0.0}
    draws: dict[str, float] = {}
    for stage in stages:
        passes = stage.solver.max_iter * stage.solver.iter_size
        learned, frozen, kind, memory = work_of(stage, dataset, folder)
        asked = 1.0
        if memory.bytes <= LIMIT:
            before, count = draws.get(kind, 0.0), passes * memory.batch
            draws[kind] = before + count
            asked = (memory.known(before + count) - memory.known(before)) / count
        found["all"] += passes * (learned + frozen)
        found["teachers"] += passes * frozen
        found["asked"] += passes * frozen * asked
    return found


def work_of(stage: Stage, dataset: Dataset, folder: Path) -> tuple[float, float, str, Memory]:
    """Of a pass of a stage: operations in layers that learn, and in frozen ones; of what kind these are, and what is remembered of them."""
    message = caffe_pb2.NetParameter()
    message.CopyFrom(stage.net)
    for layer in message.layer:
        if layer.type == "Data":
            layer.data_param.source = dataset.train_lmdb
            if layer.transform_param.HasField("mean_file"):
                layer.transform_param.mean_file = dataset.train_mean
    solver = common.solver(message, folder)
    program = solver._program(solver.net)
    found = frontier.find(program.graph, program.operations, program.at_rest)
    layers = {node.layer.name for op in found.done for node in op.nodes} if found else set()
    learned = frozen = 0.0
    for node in program.graph.nodes:
        if node.layer.type in ("Convolution", "InnerProduct"):
            count = 2.0 * node.tops[0].count * prod(node.layer.blobs[0].shape[1:])
            if node.layer.name in layers:
                frozen += count
            else:
                learned += count * (1 + BACKWARD * node.need_backward)
    data = solver.net.layers[0]
    inputs = dataset.train_size * data.variants
    size = Table.bytes(inputs, -(-found.bytes // WORD)) if found else 0
    return (learned, frozen, found.identity(parameters=False) if found else "",
            Memory("", inputs, data.variants, data.batch, size))


def runs_of(name: str) -> list[str]:
    """A row for a data set: its inputs, the file of their scores, and the share of each of four KD runs' inputs that are new."""
    dataset = DATASETS[name]
    variants = (81 if dataset.crop else 1) * (2 if dataset.mirror else 1)            # windows of a record with a border of four pixels
    inputs, words = dataset.train_size * variants, -(-4 * dataset.classes // WORD)
    memory = Memory("", inputs, variants, dataset.batch, Table.bytes(inputs, words))
    asked = SCHEDULES[name].iterations * dataset.batch
    new = [(memory.known((run + 1) * asked) - memory.known(run * asked)) / asked for run in range(4)]
    return [dataset.name, f"{inputs:,}", f"{memory.bytes / 1e6:,.1f}", f"{asked:,}", *(f"{share:.0%}" for share in new)]


def work(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements with one thread count."""
    found: dict[str, Any] = {"pairs": args.pairs, "nets": {name: measure_net(name, args.pairs) for name in args.nets}}
    with TemporaryDirectory() as folder:
        found["tables"] = {name: saved(name, Path(folder)) for name in TABLES}
    return found


# -- showing -----------------------------------------------------------------------------------------------------------------
def rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for name, ms in run["nets"].items():
        for way, title in WAYS.items():
            shown = ["", ""]
            if way in AGAINST:
                other, bar = AGAINST[way]
                ratios = [mine / theirs for mine, theirs in zip(ms[way], ms[other], strict=True)]
                shown = [f"{common.spread(ratios, '.3f')} of {WAYS[other]}", common.verdict(median(ratios) <= bar, f"{bar:.2f}")]
            yield [TITLES[name], str(run["threads"]), title, f"{median(ms[way]):.1f}", *shown]


def markdown(result: dict[str, Any]) -> str:
    """The measurement as tables and text."""
    runs = result["runs"]
    tables = [[name.replace("table", "Table "), f"{t['teachers'] / t['all']:.0%}", f"{t['asked'] / t['teachers']:.1%}",
               f"{(t['teachers'] - t['asked']) / t['all']:.0%}"] for name, t in runs[0]["tables"].items()]
    return "\n".join([
        common.table(["net", "threads", "iterations", "ms per iteration", "times: median (quartiles)", "bar: at most"],
                     *(row for run in runs for row in rows(run))),
        common.table(["data set", "inputs", "scores, MB", "read by a run", *(f"new in run {run}" for run in range(1, 5))],
                     *map(runs_of, ("mnist", "cifar10", "cifar100"))),
        common.table(["all stages and nets of", "operations in frozen layers", "of these still to be done", "saved of all"], *tables),
        common.evidence(result, f"{runs[0]['pairs']} turns, float32")])


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=25, help="turns")
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))


if __name__ == "__main__":
    common.main(__file__, __doc__, work, markdown, flags)
