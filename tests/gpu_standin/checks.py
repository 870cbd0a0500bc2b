"""What a recording needs, tried on the stand-in for a GPU: each check prints what it found as JSON, for tests/test_gpu_standin.py.

    python tests/gpu_standin/standin.py PYTHON tests/gpu_standin/checks.py CHECK ...

Kernels do nothing here, so no check looks at numbers: they look at what is recorded, at what the host still does, and at what a capture
forbids.
"""
from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import lmdbs
import tiny
import tiny_data
import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.experiment import Dataset, Experiment
from hintkd.methods.method import stages_of
from hintkd.methods.papers import paper
from hintkd.nets import stages as nets
from hintkd.nets.titles import network
from hintkd.stage import program
from hintkd.study.table import find_table, table_names
from nets import MLP, conv, write_solver
from one_layer import make, run
from standin import counted, nodes, violations
from test_layers_all import CASES, TOPS
from torchcaffe.layers.arithmetic import InnerProduct
from torchcaffe.train import together as side_by_side
from torchcaffe.train import updates

Found = dict[str, Any]
NOISE = 16                                  # records of a data set that is only read


def moving(updater: updates.Updater) -> dict[tuple[float, float], list[int]]:
    """As Updater._moving, which asks the histories' numbers."""
    found: dict[tuple[float, float], list[int]] = {}
    for i, item in enumerate(updater.learnable):
        if updater.rule not in updates.MOVED_BY_RATE_ONLY or item.lr_mult:
            found.setdefault((item.lr_mult, item.decay_mult), []).append(i)
    return found


def kd(folder: Path, seed: int = 1, **settings: Any) -> Any:
    """A solver of a ResNet-14 under a ResNet-26, with tests and displays."""
    own = folder / f"{seed}"
    own.mkdir()
    solver = common.solver(nets.kd_net(common.noise(folder, 256), iterations=1000), own,
                           **{"test_iter": [4], "test_interval": 10, "display": 5, "random_seed": seed, **settings})
    solver.exact = True
    return solver


def recorded(*solvers: Any) -> bool:
    return all(solver.is_recorded for solver in solvers)


def done(work: Callable[[], object]) -> Found:
    """What the host does in a call."""
    found = counted(work)
    return {"graphs": found["graph"], "waits": found["wait"], "copies": sum(n for name, n in found.items() if name.endswith("to host")),
            "all": found.total() - found["wait"]}


# -- the checks ---------------------------------------------------------------------------------------------------------------
def kernels(folder: Path) -> Found:
    """How much a recorded iteration holds, in each precision."""
    found: Found = {}
    for precision in ("fp32", "tf32", "bf16"):
        caffe.set_precision(precision)
        (folder / precision).mkdir()
        solver = kd(folder / precision, test_iter=[], test_interval=0)
        solver.step(1)
        found[precision] = nodes() if recorded(solver) else None
    return found


def host(folder: Path) -> Found:
    """What the host does besides: for an iteration, for one after somebody has looked, for a test."""
    solver = kd(folder)
    solver.step(1)
    found: Found = {"recorded": recorded(solver), "iteration": done(solver._iterate)}
    for name in solver.net.outputs:
        _ = solver.net.blobs[name].data
    solver._begin()
    found["looked"] = done(solver._iterate)
    for batches in (4, 8):
        solver.param.test_iter[0] = batches
        found[f"test of {batches}"] = done(lambda: solver._test(0, solver.test_nets[0]))
    return found


def orders(folder: Path) -> Found:
    """Recordings after, and iterations around, all that a script may do in between."""
    found: Found = {}
    solver = kd(folder, 1)
    solver.net.forward()
    solver.net.backward()
    solver.step(2)
    found["after forward and backward"] = recorded(solver)
    rates = [group.rate.data_ptr() for group in solver.updater.groups]
    solver.apply_update()
    solver.replay = False
    solver.step(1)
    solver.replay = True
    solver.step(1)
    found["rates stay"] = rates == [group.rate.data_ptr() for group in solver.updater.groups]
    state = solver.snapshot()
    solver.restore(state)
    solver.step(1)
    found["after restore"] = recorded(solver)
    program_of = solver._program(solver.net)
    written = {name: program_of.tops[name].data_ptr() for name in solver.net.outputs}
    solver._forward(solver.net)                             # as at the end of solve()
    solver.step(1)
    found["tops stay"] = written == {name: program_of.tops[name].data_ptr() for name in solver.net.outputs}
    return found


def shuffled(folder: Path) -> Found:
    """Records in an order of each epoch, whose last batch is short, and losses that draw and remember: CRD's and SSKD's nets."""
    zoo = paper("zoo")
    data = tiny_data.write_dataset("cifar100-zoo", folder, items=40)
    data = replace(data, train_size=40, batch=16, train_lmdb=str(folder / data.train_lmdb), test_lmdb=str(folder / data.test_lmdb))
    shared: Found = {"dataset": data, "schedule": zoo.schedule(), "options": zoo.options(), "tau": 4.0}
    taught = Experiment(zoo.methods["original"], student=network("resnet14"), generation=1, pupil=network("resnet8"), **shared)
    found: Found = {}
    for method in ("crd", "sskd"):
        stage = stages_of(Experiment(zoo.methods[method], student=network("resnet8"), teacher=taught, **shared))[-1]
        (folder / method).mkdir()
        solver = common.solver(stage.net, folder / method)
        solver.step(4)                                      # 16, 16, 8 and 16 images
        replay = solver._replayed(solver.net)
        found[method] = {"recorded": recorded(solver), "recordings": len(replay.recordings),
                         "iterations": [done(solver._iterate) for _ in range(3)]}
    return found


def refused(folder: Path) -> Found:
    """A layer that asks for a number in the middle of a pass: iterations go on unrecorded, and nothing else does."""
    whole = InnerProduct.forward

    def asking(layer: InnerProduct, x: torch.Tensor) -> torch.Tensor:
        x.sum().item()
        return whole(layer, x)
    here, pools, handle = torch.cuda.current_stream(), [], torch.cuda.graph_pool_handle

    def noted_handle() -> Any:
        pools.append(handle())
        return pools[-1]
    torch.cuda.graph_pool_handle = noted_handle
    InnerProduct.forward = asking
    solver = kd(folder)
    solver.step(2)
    InnerProduct.forward = whole
    noted, going_on = violations(), 0
    for pool in pools:
        with suppress(RuntimeError):                        # which is said of a pool that is filled no more
            torch._C._cuda_endAllocateToPool(0, pool)
            going_on += 1
    found: Found = {"recorded": recorded(solver), "iterations": solver.iter, "recordings": len(pools), "going on": going_on,
                    "stream stays": torch.cuda.current_stream() == here}
    other = kd(folder, 2)
    other.step(1)
    return {**found, "another recorded": recorded(other), "more violations": violations()[len(noted):]}


def rules(folder: Path) -> Found:
    """Every update rule, with two passes an iteration."""
    found: Found = {}
    for seed, rule in enumerate(updates.RULES, 1):
        momentum = 0 if rule in ("AdaGrad", "RMSProp") else 0.9
        solver = kd(folder, seed, type=rule, momentum=momentum, iter_size=2, test_iter=[], test_interval=0)
        solver.step(2)
        found[rule] = recorded(solver)
    return found


def together(folder: Path) -> Found:
    """Several solvers in one recording: on records, on Input layers, alone before and after."""
    found: Found = {}
    solvers = [kd(folder, seed) for seed in (1, 2)]
    group = caffe.Together(solvers)
    group.step(12)
    found["teacher shared"], found["recorded"] = len(group.shared[0]) > 25, group.replay.graph is not None
    for solver in solvers:
        solver.step(2)
    written = group.replay.now.written[0][1]["kd_loss"].data_ptr()
    group.step(1)
    found["alone"] = recorded(*solvers)
    found["its own tops"] = group.programs[0].tops["kd_loss"].data_ptr() == written
    (folder / "inputs").mkdir()
    fed = []
    for seed in (1, 2):
        (folder / f"inputs/{seed}").mkdir()
        solver = caffe.get_solver(write_solver(folder / f"inputs/{seed}", MLP, random_seed=seed))
        solver.fast = True
        solver.net.blobs["label"].data[...] = 1
        fed.append(solver)
    group = caffe.Together(fed)
    group.step(2)
    found["on inputs"] = group.replay.graph is not None
    return found


def layers(folder: Path) -> Found:
    """Every layer forward and backward, for kernels that refuse what a CPU's take."""
    failed = {}
    for kind, (shapes, text) in CASES.items():
        for dtype in (torch.float32, torch.float64):
            try:
                layer = make(kind, *shapes, text=text, tops=TOPS.get(kind, 1), device="cuda", dtype=dtype)
                bottoms = [torch.zeros(shape, dtype=dtype, device="cuda", requires_grad=i == 0) for i, shape in enumerate(shapes)]
                roots = [top for top in run(layer, *bottoms) if top.requires_grad]
                leaves = [tensor for tensor in [*bottoms, *layer.params] if tensor.requires_grad]
                if roots:
                    torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots], allow_unused=True)
            except RuntimeError as error:
                failed[f"{kind} {dtype}"] = str(error).splitlines()[0]
    return {"tried": len(CASES), "failed": failed}


def shapes(folder: Path) -> Found:
    """Weights of one channel and of one pixel, whose strides have two spellings: a few kernels still update all parameters."""
    records = np.random.default_rng(0).integers(0, 256, (32, 1, 12, 12), dtype=np.uint8)
    lmdbs.write_images(folder / "lmdb", records, [i % 10 for i in range(32)])
    pixel = conv("b", "a", 8).replace("kernel_size: 3 pad: 1", "kernel_size: 1")
    net = lmdbs.data_layer(folder / "lmdb", 16, "crop_size: 10 mirror: true scale: 0.01") + conv("a", "data", 8) + pixel + """
    layer { name: "fc" type: "InnerProduct" bottom: "b" top: "fc" inner_product_param { num_output: 10 weight_filler { type: "msra" } } }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "data_label" top: "loss" }"""
    solver = caffe.get_solver(write_solver(folder, net, weight_decay=0))
    solver.fast = True
    solver.step(1)
    program_of = solver._program(solver.net)
    gradients = program_of.gradients(program_of.forward({}))
    return {"recorded": recorded(solver), "update": done(lambda: solver.updater.apply(gradients))}


def write_noise(dataset: Dataset) -> None:
    """A few records for a data set, unless they are there."""
    for lmdb, mean, margin in ((dataset.train_lmdb, dataset.train_mean, 4 * dataset.crop), (dataset.test_lmdb, dataset.test_mean, 0)):
        if not Path(lmdb).exists():
            side = dataset.size + 2 * margin
            images = np.random.default_rng(0).integers(0, 256, (NOISE, dataset.channels, side, side), dtype=np.uint8)
            tiny_data.write_lmdb(Path(lmdb), images, np.arange(NOISE) % dataset.classes)
            if mean:
                tiny_data.write_mean(Path(mean), images)


def tables(folder: Path) -> Found:
    """Every net of every table's stages, trained and tested; of the zoo's, whose rows are pairs, each network and each method once."""
    os.chdir(folder)
    recorded_nets, others, known, zoo = 0, [], set(), paper("zoo").options
    for table in map(find_table, table_names()):
        big = table.paper == "byot" and len(table.rows) > 20     # its other tables have the same kinds of nets
        for x in [] if big else table.experiments(nets=[1], scale=0.01):
            for dataset in {each.dataset for each in (x, x.teacher) if isinstance(each, Experiment)}:
                write_noise(dataset)
            small = replace(x, dataset=replace(x.dataset, train_size=NOISE))
            for stage in stages_of(small):
                text = write_text(stage.net)
                kind: object = text
                if isinstance(x.options, zoo):
                    kind = x.method.name, stage.title, "" if x.method.needs_teacher else x.student.title
                if kind in known:
                    continue
                known.add(kind)
                settings = caffe_pb2.SolverParameter()
                settings.CopyFrom(stage.solver)
                settings.net, settings.test_iter[:] = "net.prototxt", [1] * len(settings.test_iter)
                Path("net.prototxt").write_text(text)
                Path("solver.prototxt").write_text(write_text(settings))
                solver = caffe.get_solver("solver.prototxt")
                solver.fast = True
                solver.step(1)
                replays = [solver._replayed(net) for net in (solver.net, *solver.test_nets)]
                if all(replay is not None and replay.graph is not None for replay in replays[:1 + bool(settings.test_initialization)]):
                    recorded_nets += 1
                else:
                    others.append(f"{table.name} {x.method.name} {stage.title}")
    return {"recorded": recorded_nets, "others": others}


def stages(folder: Path) -> Found:
    """The stage process: alone, in a group, and measuring."""
    os.chdir(folder)
    tiny.write_data(folder)

    def write(name: str, seed: int = 1, **more: Any) -> str:
        Path(name).mkdir()
        solver, net = tiny.solver(seed), tiny.net()
        solver.net, solver.snapshot_prefix = f"{name}/net.prototxt", f"{name}/snapshot"
        Path(name, "net.prototxt").write_text(write_text(net))
        Path(name, "solver.prototxt").write_text(write_text(solver))
        stage = {"title": name, "key": name, "program": "solve", "iterations": solver.max_iter, "snapshot": solver.snapshot, "threads": 1,
                 "test_iter": sum(solver.test_iter), "predictions": {}, "backend": "torchcaffe", "device": "gpu", "device_id": 0,
                 "precision": "tf32", "inexact": False, "group": [name], **more}
        Path(name, "stage.json").write_text(json.dumps(stage))
        return name
    write("a")
    pair = [write(name, seed, group=["b", "c"]) for seed, name in enumerate("bc", 2)]
    write("p", program="probe", seconds=0.2)
    found: Found = {"alone": program.run("a")["iterations"], "group": [each["iterations"] for each in program.run_together(pair)],
                    "probe": program.run("p")["train_s"] > 0}
    found["not replayed"] = [line for name in "abcp" for line in Path(name, "log.txt").read_text().splitlines() if "not replayed" in line]
    return found


CHECKS: dict[str, Callable[[Path], Found]] = {check.__name__: check for check in (kernels, host, orders, shuffled, refused, rules,
                                                                                  together, layers, shapes, tables, stages)}


def main(names: list[str]) -> None:
    os.environ.setdefault("GLOG_minloglevel", "1")
    updates.Updater._moving = moving
    side_by_side.computes = lambda node: side_by_side.settings(node.layer)         # the parameters' numbers left out
    for name in names:
        caffe.set_mode_gpu()
        caffe.set_precision("fp32")
        before = len(violations())
        with tempfile.TemporaryDirectory() as folder:
            found = CHECKS[name](Path(folder))
        print(json.dumps({"check": name, "violations": violations()[before:], **found}), flush=True)
    sys.stdout.flush()
    os._exit(0)                                             # libraries that wait for a device at their end wait in vain


if __name__ == "__main__":
    main(sys.argv[1:] or list(CHECKS))
