"""The `caffe` tool: `torchcaffe train`, `test` and `time`, with its flags (`-solver`, `--solver` and `--solver=` alike) and its log lines.

What a command does is the solver's and the net's business; here are flags, devices, signals, and one sentence and status 2 for what
is wrong.  All other commands are modules of torchcaffe.tools.  Caffe: tools/caffe.cpp.
"""
from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np
import torch

from torchcaffe import settings
from torchcaffe.errors import CaffeError, sentence
from torchcaffe.export import export
from torchcaffe.glog import info
from torchcaffe.net import TEST, TRAIN, Net
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.settings import set_device, set_mode_cpu, set_mode_gpu
from torchcaffe.tools import (
    Run,
    check,
    compute_image_mean,
    convert_imageset,
    convert_leveldb,
    draw,
    extract_features,
    names,
    summary,
    upgrade_proto,
)
from torchcaffe.train.launch import Group, obey
from torchcaffe.train.parallel import NCCL
from torchcaffe.train.solver import Solver, snapshot_problem
from torchcaffe.train.solver_types import get_solver
from torchcaffe.version import ENGINE

SOURCE = "caffe.cpp:0"
BUILDERS = ("train", "test", "time", "export", "extract_features", "summary", "check")     # commands that build nets
TOOLS = (upgrade_proto, convert_imageset, convert_leveldb, compute_image_mean, extract_features, summary, draw, check)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: its own, mostly 0; 2 for a mistake in flags or files, 130 when interrupted outside training."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        args = _parser().parse_args([re.sub(r"^-(?=[a-z]\w)", "--", argument) for argument in given])
        with _python_layers(args), _tracebacks(args):
            return args.command(args) or 0
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        words = sentence(error)
        if words is None:
            raise
        print(f"torchcaffe: {words}", file=sys.stderr)
        return 2


# -- commands ------------------------------------------------------------------------------------------------------
def train(args: argparse.Namespace) -> None:
    """Train as a solver prototxt says, from --weights or from a --snapshot; SIGINT stops with a snapshot, SIGHUP takes one."""
    if args.weights and args.snapshot:
        raise CaffeError("--weights and --snapshot exclude each other: weights to start from, or a state to resume")
    if args.gpu and args.processes > 1:
        raise CaffeError("--gpu and --processes exclude each other: one process for each GPU, or several on the CPU")
    param = prototxt.read_solver(args.solver)
    param.train_state.level = args.level
    param.train_state.stage.extend(args.stage)
    if args.weights or args.snapshot:
        param.ClearField("weights")
        param.weights.extend(args.weights)
    if not args.gpu and args.processes == 1 and param.HasField("solver_mode") and param.solver_mode == caffe_pb2.SolverParameter.GPU:
        if not torch.cuda.is_available():
            raise CaffeError(f"{args.solver}: solver_mode is GPU, but torch finds no CUDA device here; write solver_mode: CPU")
        args.gpu = [param.device_id]
    if problem := snapshot_problem(param):                      # found out now, not after hours of training; signals ask for snapshots, too
        raise CaffeError(f"{args.solver}: {problem}")
    effects = {signal.SIGINT: args.sigint_effect, signal.SIGHUP: args.sighup_effect}
    count = len(args.gpu) or args.processes
    if count == 1:
        solver = _solver(args, param)
        info("Starting Optimization", SOURCE)
        with _signals(effects, solver.request):
            solver.solve()
    else:
        info(f"Using GPUs {', '.join(map(str, args.gpu))}" if args.gpu else f"Using {count} processes", SOURCE)
        with Group(count, _train_together, args, param) as group, _signals(effects, group.request):
            group.wait()
    info("Optimization Done.", SOURCE)


def _train_together(uid: str, orders: Connection, args: argparse.Namespace, param: caffe_pb2.SolverParameter) -> None:
    """What each process of several does."""
    with _python_layers(args), _tracebacks(args):
        solver = _solver(args, param)
        nccl = NCCL(solver, uid)
        nccl.bcast()
        solver.add_callback(nccl)
        obey(orders, nccl.request)
        info("Starting Optimization", SOURCE)
        solver.solve()


def _solver(args: argparse.Namespace, param: caffe_pb2.SolverParameter) -> Solver:
    """This process's solver, on its device, as it was in --snapshot."""
    _use_device(args.gpu[settings.solver_rank()] if args.gpu else None, args.precision)
    solver = get_solver(args.solver, param)
    solver.fast, solver.compile, solver.remember = True, args.compile, args.remember
    if args.snapshot:
        info(f"Resuming from {args.snapshot}", SOURCE)
        solver.restore(args.snapshot)
    return solver


def test(args: argparse.Namespace) -> None:
    """Score weights: every output of every batch, then the loss and the outputs averaged over the batches."""
    _use_device(_first(args.gpu))
    net = Net(args.model, TEST, level=args.level, stages=args.stage)
    for weights in args.weights:
        net.copy_from(weights)
    info(f"Running for {args.iterations} iterations.", SOURCE)
    loss, scores = 0.0, {name: np.zeros(0) for name in net.outputs}
    for batch in range(args.iterations):
        loss += net._forward(0, len(net.layers) - 1)
        for name in net.outputs:
            values = net.blobs[name].data.ravel().astype(float)
            for value in values:
                info(f"Batch {batch}, {name} = {value:g}", SOURCE)
            scores[name] = scores[name] + values if batch else values
    info(f"Loss: {loss / args.iterations:g}", SOURCE)
    for name, total in scores.items():
        weight = net.blob_loss_weights[name]
        for mean in total / args.iterations:
            info(f"{name} = {mean:g}" + (f" (* {weight:g} = {weight * mean:g} loss)" if weight else ""), SOURCE)


def time_layers(args: argparse.Namespace) -> None:
    """Time forward and backward of every layer, in ms, averaged over the iterations."""
    _use_device(_first(args.gpu))
    net = Net(args.model, {"TRAIN": TRAIN, "TEST": TEST}[args.phase], level=args.level, stages=args.stage)
    last = len(net.layers) - 1
    info("Performing Forward", SOURCE)
    info(f"Initial loss: {net._forward(0, last):g}", SOURCE)
    info("Performing Backward", SOURCE)
    net._backward(last, 0)
    info("*** Benchmark begins ***", SOURCE)
    info(f"Testing for {args.iterations} iterations.", SOURCE)
    forward, backward = np.zeros(last + 1), np.zeros(last + 1)
    begin = time.perf_counter()
    for iteration in range(args.iterations):
        start = time.perf_counter()
        for i in range(last + 1):
            forward[i] += _milliseconds(net._forward, i)
        for i in range(last, -1, -1):
            backward[i] += _milliseconds(net._backward, i)
        info(f"Iteration: {iteration + 1} forward-backward time: {(time.perf_counter() - start) * 1e3:g} ms.", SOURCE)
    total = (time.perf_counter() - begin) * 1e3
    info("Average time per layer: ", SOURCE)
    for i, name in enumerate(net._layer_names):
        info(f"{name:>10}\tforward: {forward[i] / args.iterations:g} ms.", SOURCE)
        info(f"{name:>10}\tbackward: {backward[i] / args.iterations:g} ms.", SOURCE)
    info(f"Average Forward pass: {forward.sum() / args.iterations:g} ms.", SOURCE)
    info(f"Average Backward pass: {backward.sum() / args.iterations:g} ms.", SOURCE)
    info(f"Average Forward-Backward: {total / args.iterations:g} ms.", SOURCE)
    info(f"Total Time: {total:g} ms.", SOURCE)
    info("*** Benchmark ends ***", SOURCE)


def export_net(args: argparse.Namespace) -> None:
    """Write a net with its weights as a PyTorch module (OUT.py and OUT.safetensors) or as an ONNX model (OUT.onnx), checked against it."""
    print(export(args.net, args.weights, args.out, {"TRAIN": TRAIN, "TEST": TEST}[args.phase], args.level, args.stage))


@contextmanager
def _signals(effects: dict[signal.Signals, str], request: Callable[[str], None]) -> Iterator[None]:
    """Within the block a signal asks the solver for its effect, "stop" or "snapshot", or has "none"."""
    before = {number: signal.signal(number, signal.SIG_IGN if effect == "none" else lambda *_, effect=effect: request(effect))
              for number, effect in effects.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _milliseconds(run: Callable[[int, int], object], layer: int) -> float:
    """How long one pass of one layer takes, the GPU's work included."""
    start = time.perf_counter()
    run(layer, layer)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _python_layers(args: argparse.Namespace) -> AbstractContextManager[None]:
    """The setting that --no-python-layers asks for."""
    return settings.without_python_layers() if getattr(args, "no_python_layers", False) else nullcontext()


@contextmanager
def _tracebacks(args: argparse.Namespace) -> Iterator[None]:
    """Within the block --debug shows where an error comes from, before it becomes a sentence."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if getattr(args, "debug", False) and sentence(error) is not None:
            traceback.print_exception(error)
        raise


def _first(gpus: list[int]) -> int | None:
    """The one GPU of a command that takes no more."""
    for gpu in gpus[1:]:
        info(f"Not using GPU #{gpu} for single-GPU function", SOURCE)
    return gpus[0] if gpus else None


def _use_device(gpu: int | None, precision: str = "fp32") -> None:
    settings.set_precision(precision)
    if gpu is None:
        info("Use CPU.", SOURCE)
        set_mode_cpu()
    else:
        info(f"Use GPU with device ID {gpu}", SOURCE)
        set_device(gpu)
        set_mode_gpu()


# -- flags ---------------------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    """One sentence instead of argparse's usage and message."""

    def error(self, message: str) -> NoReturn:
        raise CaffeError(f"{message}; see {self.prog} --help")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _gpus(text: str) -> list[int]:
    if text == "all":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch finds no CUDA device here; leave it away")
        return list(range(torch.cuda.device_count()))
    if not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a GPU, several numbers with commas between, or 'all'")
    gpus = [int(number) for number in text.split(",")]
    if len(set(gpus)) < len(gpus):
        raise argparse.ArgumentTypeError(f"{text!r} names a GPU twice")
    return gpus


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="torchcaffe", description="Train, test and time Caffe nets, and what Caffe's other tools do.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=ENGINE)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, run: Run) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        sub.set_defaults(command=run)
        return sub

    def command(name: str, run: Run, computes: bool = True) -> Callable[..., object]:
        sub = add(name, run)

        def flag(long: str, **options: object) -> None:
            sub.add_argument(f"--{long}", **options)  # type: ignore[arg-type]

        if computes:
            flag("gpu", type=_gpus, default=[], metavar="N,M", help="run on this GPU instead of the CPU; train on several, or on 'all'")
        flag("level", type=int, default=0, metavar="N", help="level of the net's state")
        flag("stage", type=names, default=[], metavar="A,B", help="stages of the net's state")
        return flag

    flag = command("train", train)
    flag("solver", required=True, metavar="FILE", help="solver prototxt")
    flag("weights", type=names, default=[], metavar="A,B", help="caffemodels to start from, matched by layer name")
    flag("snapshot", metavar="FILE", help="solver state to resume")
    flag("precision", choices=settings.PRECISIONS, default="fp32", help="of products: tf32 on a GPU, bf16; losses and updates stay fp32")
    flag("remember", metavar="FOLDER", help="keep there what frozen layers give, once for all runs on the same data")
    flag("compile", action="store_true", help="compile whole iterations with torch.compile; needs a C++ compiler")
    flag("processes", type=_count, default=1, metavar="N", help="train in N processes on the CPU, each with a batch of its own")
    for name, default in (("sigint_effect", "stop"), ("sighup_effect", "snapshot")):
        flag(name, choices=("snapshot", "stop", "none"), default=default, help=f"what {name[:-7].upper()} does (default: %(default)s)")
    flag = command("test", test)
    flag("model", required=True, metavar="FILE", help="net prototxt")
    flag("weights", type=names, required=True, metavar="A,B", help="caffemodels, matched by layer name")
    flag("iterations", type=_count, default=50, metavar="N", help="batches to run (default: %(default)s)")
    flag = command("time", time_layers)
    flag("model", required=True, metavar="FILE", help="net prototxt")
    flag("phase", choices=("TRAIN", "TEST"), default="TRAIN", help="phase of the net (default: %(default)s)")
    flag("iterations", type=_count, default=50, metavar="N", help="passes to time (default: %(default)s)")
    flag = command("export", export_net, computes=False)
    flag("phase", choices=("TRAIN", "TEST"), default="TEST", help="phase whose layers are exported (default: %(default)s)")
    for name, what in (("net", "net prototxt"), ("weights", "its caffemodel"), ("out", "OUT.py or OUT.onnx")):
        commands.choices["export"].add_argument(name, help=what)
    for tool in TOOLS:
        tool.register(add)
    for name in BUILDERS:
        commands.choices[name].add_argument("--no-python-layers", action="store_true", help="refuse nets that import Python layers")
        commands.choices[name].add_argument("--debug", action="store_true", help="show the traceback of what goes wrong, too")
    return parser
