#!/usr/bin/env python3
"""How fast an iteration of each distillation method is, beside the same method written by hand for PyTorch.

    python benchmarks/zoo.py [--pairs 25] [--threads 1 2] [--nets ...] [--methods ...] [--quick]      measure into benchmarks/zoo.json
    python benchmarks/zoo.py --render                                                  benchmarks/zoo.json into docs/performance.md

Ways take turns in one process on one batch of 64: the method's last stage as hintkd writes it, by torchcaffe's whole-iteration step,
and handwritten_zoo.py: eager, channels-last, its teacher under no_grad.  Where all that is asked of the teacher is its scores or pooled
features, a third one reads records of noise whose teacher was asked before.  A figure is the median over the turns of the ratio within
a turn.  Before they are timed, the losses of the first two's first iterations are compared.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import common
import handwritten_zoo as hand
from common import seconds
from data_prep.split import Split, silent
from data_prep.write import write_dataset
from hintkd.backend import caffe_pb2
from hintkd.experiment import DATASETS, Dataset, Experiment
from hintkd.methods.papers import paper
from hintkd.methods.stage import Stage
from hintkd.nets.titles import network
from remembered import fill, noise
from torchcaffe.graph.build import Node

BATCH, BARS = 64, {"step": 1.0, "remembered": 0.95}         # at most so many times by hand
NETS = {"resnet8x4": ("resnet8x4", "resnet32x4"), "wrn_16_2": ("wrn_16_2", "wrn_40_2")}
BY_HAND: dict[str, Callable[[], Any]] = {
    "resnet8x4": lambda: hand.ResNet(8, 4), "resnet32x4": lambda: hand.ResNet(32, 4), "wrn_16_2": lambda: hand.WideResNet(16, 2),
    "wrn_40_2": lambda: hand.WideResNet(40, 2)}
SMALL = ("kd", "rkd", "pkt")                # methods whose teacher is remembered
NOISE = 256                                 # records
DRAWN = ("crd",)                            # methods with random numbers of their own, so that losses are not the same
QUICK = 3


def stage_of(method: str, name: str, folder: Path, dataset: Dataset = DATASETS["cifar100-zoo"]) -> Stage:
    """The last stage of a method, whose memory bank knows the labels of 50,000 records."""
    zoo, (student, teacher) = paper("zoo"), map(network, NETS[name])
    shared: dict[str, Any] = {"dataset": dataset, "schedule": zoo.schedule(), "options": zoo.options(), "tau": hand.TAU}
    if method in DRAWN:
        labels = np.random.default_rng(0).integers(0, hand.CLASSES, 50_000).astype(np.int32)
        split = Split(np.zeros((len(labels), 3, 1, 1), np.uint8), labels)
        if not (folder / "labels").exists():
            write_dataset(folder / "labels", {"train": split, "test": split}, split.mean(), {"dataset": "labels"}, silent)
        shared["dataset"] = replace(dataset, train_lmdb=str(folder / "labels/train_lmdb"))
    taught = Experiment(zoo.methods["original"], student=teacher, generation=1, **shared)
    return zoo.methods[method](Experiment(zoo.methods[method], student=student, teacher=taught, **shared))[-1]


def solver(stage: Stage, folder: Path) -> Any:
    """Its solver in one piece, on Input layers."""
    shapes = {"data": (BATCH, 3, 32, 32), "label": (BATCH,), "position": (BATCH,)}
    net = caffe_pb2.NetParameter(name=stage.net.name)
    for layer in stage.net.layer:
        if any(rule.phase == caffe_pb2.TEST for rule in layer.include):
            continue
        if layer.bottom:
            net.layer.add().CopyFrom(layer)
            continue
        for top in layer.top:
            net.layer.add(name=top, type="Input", top=[top], input_param={"shape": [{"dim": shapes[top]}]})
    made = common.solver(net, folder, base_lr=hand.RATE, momentum=hand.MOMENTUM, weight_decay=hand.DECAY)
    images, labels = batch()
    made.net.blobs["data"].data[...], made.net.blobs["label"].data[...] = images, labels
    if "position" in made.net.blobs:
        made.net.blobs["position"].data[...] = np.arange(BATCH)
    return made


def remembering(method: str, name: str, folder: Path) -> Any:
    """A solver that reads records of noise, for all of whose inputs a file has what the teacher gives."""
    if not (folder / "noise").exists():
        noise(DATASETS["cifar100-zoo"], folder / "noise", NOISE)
    dataset = replace(DATASETS["cifar100-zoo"], train_lmdb=str(folder / "noise/train_lmdb"), train_size=NOISE)
    stage = stage_of(method, name, folder, dataset)
    net = caffe_pb2.NetParameter(name=stage.net.name)
    net.layer.extend(layer for layer in stage.net.layer if not any(rule.phase == caffe_pb2.TEST for rule in layer.include))
    made = common.solver(net, folder, base_lr=hand.RATE, momentum=hand.MOMENTUM, weight_decay=hand.DECAY)
    made.remember = str(folder / "remembered" / f"{name}-{method}")
    made.step(1)
    fill(made.memory)
    return made


def batch() -> tuple[np.ndarray, np.ndarray]:
    images, _ = common.records(BATCH)
    return images, np.random.default_rng(1).integers(0, hand.CLASSES, BATCH).astype(np.float32)


def weights(trained: Any, stage: Stage) -> dict[str, list[torch.Tensor]]:
    """The parameters that a hand-written module has, too, in the net's order: of the teacher, the student and what is between them."""
    found: dict[str, list[torch.Tensor]] = {"teacher": [], "student": [], "adapters": []}
    seen: set[int] = set()
    for node in trained.net.graph.nodes:
        name = node.layer.name
        if name in trained.net.params and _is_by_hand(node) and node.owners[0] not in seen:
            seen.update(node.owners)
            side = "teacher" if name.startswith("teacher/") else "student" if stage.keeps(name) else "adapters"
            found[side] += [torch.from_numpy(np.array(blob.data)) for blob in trained.net.params[name]]
    return found


def _is_by_hand(node: Node) -> bool:
    return node.layer.type != "BatchNorm" and node.layer.param.python_param.layer not in ("ContrastiveLoss", "MarginLoss")


def measure(method: str, name: str, pairs: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of an iteration of each way, `pairs` of each."""
    common.progress(f"  {name}: {method}")
    stage = stage_of(method, name, folder)
    engine = solver(stage, folder)
    images, labels = (torch.from_numpy(each) for each in batch())
    mine, theirs = (BY_HAND[title]() for title in NETS[name])
    step = hand.training_step(method, mine, theirs, weights(engine, stage), images, labels.long())
    engine.step(1)
    losses = [float(engine.net.blobs[top].data.sum()) * weight for node in engine.net.graph.nodes
              for top, weight in zip(node.top_names, node.loss_weights, strict=True) if weight]
    by_hand = step().item()
    if method not in DRAWN:
        np.testing.assert_allclose(sum(losses), by_hand, rtol=1e-3, err_msg=f"{name}: {method} is not the same by hand")
    if engine.layer_by_layer:
        raise SystemExit(f"zoo.py: {method} does not run as a whole iteration")
    ways: dict[str, Callable[[], object]] = {"hand": step, "step": lambda: engine.step(1)}
    if method in SMALL:
        known = remembering(method, name, folder)
        ways["remembered"] = lambda: known.step(1)
    order, ms = list(ways), {way: list[float]() for way in ways}
    for turn in range(-1, pairs):                            # the first one warms up
        order.append(order.pop(0))                           # another one comes first each time
        for way in order:
            found = 1e3 * seconds(ways[way])
            if turn >= 0:
                ms[way].append(found)
    return ms


def work(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements with one thread count."""
    pairs = QUICK if args.quick else args.pairs
    with TemporaryDirectory() as folder:
        return {"pairs": pairs, "nets": {name: {method: measure(method, name, pairs, Path(folder)) for method in args.methods}
                                         for name in args.nets}}


# -- showing -----------------------------------------------------------------------------------------------------------------
def rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for name, methods in run["nets"].items():
        for method, ms in methods.items():
            for way in [way for way in BARS if way in ms]:
                ratios = [a / b for a, b in zip(ms[way], ms["hand"], strict=True)]
                met = common.verdict(median(ratios) <= BARS[way], f"{BARS[way]:.2f}")
                yield ["{} under {}".format(*NETS[name]), method, str(run["threads"]), way, f"{median(ms['hand']):.0f}",
                       f"{median(ms[way]):.0f}", common.spread(ratios, ".3f"), met]


def markdown(result: dict[str, Any]) -> str:
    """The measurement as a table."""
    head = ["nets", "method", "threads", "way", "by hand, ms", "ms", "times by hand: median (quartiles)", "bar: at most"]
    return "\n".join([common.table(head, *(row for run in result["runs"] for row in rows(run))),
                      common.evidence(result, f"{result['runs'][0]['pairs']} turns, float32, batch {BATCH}")])


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=25, help="turns")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} turns")
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="*", choices=hand.LOSSES, default=list(hand.LOSSES))


if __name__ == "__main__":
    common.main(__file__, __doc__, work, markdown, flags)
