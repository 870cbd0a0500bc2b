"""What the benchmarks share: nets and solvers to measure, clocks, rates of the machine, conditions, and tables in docs/performance.md.

Every program measures in processes of its own, one for each thread count, and writes a JSON file with what it measured and on which
machine with which versions; `--render` puts that file's tables between the program's two marks in docs/performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import handwritten
import torchcaffe as caffe
from data_prep.split import Split, silent
from data_prep.write import write_dataset
from hintkd.backend import caffe_pb2, environment, write_text
from hintkd.experiment import DATASETS, Experiment, Options, Trained
from hintkd.methods.hint_2019 import kd
from hintkd.nets import stages as nets
from hintkd.nets.resnet import ResNet
from hintkd.stage.program import machine
from hintkd.study.record import commit

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/performance.md"
BATCH = 128
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}       # as torchcaffe sets them, for the processes that measure
WIDE = (64, 128, 256)
MEAN, SCALE = 128, 1 / 64                                               # of images of bytes
TEACHER = Trained(Path("teacher.caffemodel"), network=ResNet(26))       # of nets that are built; no weights are read
EXPERIMENT = Experiment(kd, DATASETS["cifar10"], ResNet(14), TEACHER, options=Options(mean="none"), tau=handwritten.TAU,
                        lambda_=handwritten.LAMBDA)


# -- nets --------------------------------------------------------------------------------------------------------------------
def net_message(student: ResNet, teacher: ResNet | None = None, batch: int = BATCH, folder: Path | None = None,
                dataset: str = "cifar10") -> caffe_pb2.NetParameter:
    """The training net of a ResNet, alone or under a teacher, fed by Input layers "data" and "label", or with the same from `folder`.

    There an LMDB is written of the one batch, which a GPU keeps: from Input layers, which a script may write, it fetches every batch.
    Images have the shape of the data set's.
    """
    x = replace(EXPERIMENT, dataset=DATASETS[dataset], student=student, teacher=teacher and replace(TEACHER, network=teacher))
    whole = nets.kd_net(x, iterations=1000) if teacher else nets.plain_net(x)
    net = caffe_pb2.NetParameter(name=whole.name)
    if folder:
        split = Split(*record_bytes(batch, x.dataset.shape))
        write_dataset(folder / "batch", {"train": split, "test": split}, split.mean(), {"dataset": "noise"}, silent)
        net.layer.add(name="data", type="Data", top=["data", "label"], transform_param={"mean_value": [MEAN], "scale": SCALE},
                      data_param={"source": str(folder / "batch/train_lmdb"), "backend": "LMDB", "batch_size": batch})
    else:
        net.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": [batch, *x.dataset.shape]}]})
        net.layer.add(name="label", type="Input", top=["label"], input_param={"shape": [{"dim": [batch]}]})
    net.layer.extend(layer for layer in whole.layer if layer.type != "Data")
    return net


def noise(folder: Path, count: int) -> Experiment:
    """The KD experiment on `count` records of noise, prepared as CIFAR-10 is: padded, with mean files, for random crops and mirroring."""
    random = np.random.default_rng(0)
    train, test = (Split(random.integers(0, 256, (n, 3, side, side), np.uint8), random.integers(0, 10, n).astype(np.int32))
                   for n, side in ((count, 40), (400, 32)))
    write_dataset(folder / "data", {"train": train, "test": test}, train.mean(), {"dataset": "noise"}, silent)
    files = {f"{part}_{kind}": str(folder / f"data/{part}_{name}") for part in ("train", "test")
             for kind, name in (("lmdb", "lmdb"), ("mean", "mean.binaryproto"))}
    return replace(EXPERIMENT, options=Options(), dataset=replace(EXPERIMENT.dataset, **files))


def solver(net: caffe_pb2.NetParameter, folder: Path, fast: bool = True, compiled: bool = False, **settings: Any) -> Any:
    """A solver of the net, which it starts with seed 1, whatever the way it runs; `settings` are fields of its prototxt."""
    (folder / "net.prototxt").write_text(write_text(net))
    (folder / "solver.prototxt").write_text(write_text(caffe_pb2.SolverParameter(**{
        "net": str(folder / "net.prototxt"), "type": "SGD", "base_lr": handwritten.RATE, "lr_policy": "fixed",
        "momentum": handwritten.MOMENTUM, "weight_decay": handwritten.DECAY, "random_seed": 1, "max_iter": 10**6,
        "snapshot_prefix": str(folder / "snapshot"), "snapshot_after_train": False, **settings})))
    result = caffe.get_solver(str(folder / "solver.prototxt"))
    result.fast, result.compile = fast, compiled
    for name, blobs in result.net.params.items():            # a teacher that was never trained: statistics of 0 and 1
        if name.startswith("teacher/") and name.endswith("_bn"):
            blobs[1].data[...] = blobs[2].data[...] = 1
    return result


def record_bytes(batch: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Noise images (batch, *shape) of bytes and labels (batch), the same each time."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (batch, *shape), np.uint8), random.integers(0, 10, batch).astype(np.int32)


def records(batch: int = BATCH, shape: tuple[int, ...] = (3, 32, 32)) -> tuple[np.ndarray, np.ndarray]:
    """The same as a net sees them: numbers from -2 to 2."""
    images, labels = record_bytes(batch, shape)
    return (images.astype(np.float32) - MEAN) * SCALE, labels.astype(np.float32)


def feed(net: Any) -> None:
    """Fill the Input layers, if there are any."""
    if net.inputs:
        net.blobs["data"].data[...], net.blobs["label"].data[...] = records(net.blobs["data"].shape[0], net.blobs["data"].shape[1:])


def require_recorded(trained: Any) -> None:
    """End the program where a GPU does not replay a solver's iterations: what was measured would be something else."""
    if on_gpu() and not trained.is_recorded:
        sys.exit("the iterations are not replayed from a recording; the log says why, with GLOG_minloglevel=1")


def together(solvers: list[Any]) -> Any:
    """The solvers as a group that has made one iteration, on a GPU from a recording."""
    group = caffe.Together(solvers)
    group.step(1)
    if on_gpu() and (group.replay is None or group.replay.graph is None):
        sys.exit("the group's iterations are not replayed from a recording; the log says why, with GLOG_minloglevel=1")
    return group


def activation_bytes(net: Any) -> dict[str, int]:
    """Bytes of the blobs of a torchcaffe net, copies by Split left out: of those that a gradient reaches ("learned") and others."""
    result = {"learned": 0, "frozen": 0}
    seen: set[int] = set()
    for node in (node for node in net.graph.nodes if node.layer.type != "Split"):
        for blob in node.tops:
            if id(blob) not in seen:
                result["learned" if node.need_backward else "frozen"] += blob.count * blob.data_slot.dtype.itemsize
            seen.add(id(blob))
    return result


# -- measuring ---------------------------------------------------------------------------------------------------------------
def on_gpu() -> bool:
    return torch.cuda.is_initialized()


def seconds(function: Callable[[], object], times: int = 1) -> float:
    """Wall time of a call, the mean of so many, with what a GPU still has to do."""
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    if on_gpu():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def _fused_operations(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    return conv_flop_count(x, weight, out_shape)


def _summing_operations(_: list[int], *convolution: Any, **more: Any) -> int:
    return _fused_operations(*convolution, **more)


# The convolutions of torchcaffe/step/folding.py, which torch's counter does not know.
FUSED = {torch.ops.mkldnn._convolution_pointwise: _fused_operations,
         torch.ops.mkldnn._convolution_pointwise_: _summing_operations} if torch.backends.mkldnn.is_available() else {}
FUSED |= {torch.ops.aten.cudnn_convolution_relu: _fused_operations, torch.ops.aten.cudnn_convolution_add_relu: _fused_operations}


def operations(function: Callable[[], object]) -> dict[str, float]:
    """The floating-point operations of a call, in convolutions ("conv") and in products of matrices ("sgemm")."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        function()
    found = {"conv": 0.0, "sgemm": 0.0}
    for operator, count in counter.get_flop_counts()["Global"].items():
        found["conv" if "conv" in str(operator) else "sgemm"] += count
    return found


def operations_of(trained: Any) -> dict[str, float]:
    """Those of an iteration of a solver, led by the host: a recording that is replayed calls nothing that could be counted."""
    before, trained.replay = trained.replay, False
    found = operations(lambda: trained.step(1))
    trained.replay = before
    return found


def rates() -> dict[str, tuple[Callable[[], object], float]]:
    """What the machine can do: functions, and the operations of each, or bytes read and written.

    A matrix product, a convolution as ResNets have it, and a copy that no cache holds.
    """
    kind = torch.device("cuda" if on_gpu() else "cpu")
    size, a, b = 1024, torch.randn(1024, 1024, device=kind), torch.randn(1024, 1024, device=kind)
    x = torch.randn(32, 64, 32, 32, device=kind).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device=kind).contiguous(memory_format=torch.channels_last)
    source = torch.zeros(2**25, device=kind)
    target = torch.zeros_like(source)
    return {"sgemm": (lambda: a @ b, 2.0 * size**3), "conv": (lambda: F.conv2d(x, w, padding=1), 2.0 * x.numel() * w[0].numel()),
            "copy": (lambda: target.copy_(source), 2.0 * source.numel() * source.itemsize)}


def measured_rates(turns: int = 5) -> dict[str, float]:
    """Operations per second, and bytes per second: the median of some turns."""
    found = {}
    for name, (function, amount) in rates().items():
        seconds(function, 3)
        found[name] = amount / median(seconds(function, 3) for _ in range(turns))
    return found


def floors(work: dict[str, float], moved: float, known: dict[str, float]) -> dict[str, float]:
    """The least milliseconds for so many operations, and for so many bytes, at the machine's rates."""
    return {"arithmetic": 1e3 * (work["conv"] / known["conv"] + work["sgemm"] / known["sgemm"]), "memory": 1e3 * moved / known["copy"]}


def traffic(net: Any) -> float:
    """The least bytes an iteration moves: every blob written and read, and so its gradient where there is one."""
    found = activation_bytes(net)
    return 4.0 * found["learned"] + 2.0 * found["frozen"]


def busy_seconds() -> float | None:
    """Processor time that everything on this machine has taken since it started; None where /proc does not say."""
    try:
        fields = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    except OSError:
        return None
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- programs ----------------------------------------------------------------------------------------------------------------
Work = Callable[[argparse.Namespace], dict[str, Any]]
Markdown = Callable[[dict[str, Any]], str]


def main(program: str, about: str | None, work: Work, markdown: Markdown, flags: Callable[[argparse.ArgumentParser], None],
         obstacle: Callable[[argparse.Namespace], str | None] = lambda args: None) -> None:
    """A benchmark's command line: `work` measures in a process for each thread count, `markdown` shows what all of them found.

    `obstacle` says in a line why nothing can be measured as the flags ask for it, if so.
    """
    name = Path(program).stem
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (1 and 2; 1 on a GPU)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / f"benchmarks/{name}.json")
    parser.add_argument("--render", action="store_true", help=f"write benchmarks/{name}.json into docs/performance.md, and measure nothing")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    flags(parser)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_observed(work, args)))
    elif args.render:
        PAGE.write_text(rendered(PAGE.read_text(), name, markdown(json.loads((ROOT / f"benchmarks/{name}.json").read_text()))))
    else:
        if args.device == "gpu" and not torch.cuda.is_available():
            parser.exit(2, f"{name}.py: torch finds no GPU here; leave --device gpu away\n")
        if problem := obstacle(args):
            parser.exit(2, f"{name}.py: {problem}\n")
        result = _measured(program, args)
        args.output.write_text(json.dumps(result) + "\n")
        print(markdown(result), end="")


def _measured(program: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a process of the program found for each thread count, and under which conditions."""
    runs = []
    for threads in args.threads or ([1, 2] if args.device == "cpu" else [1]):
        progress(f"{Path(program).name}: {args.device}, {threads} thread(s)")
        done = subprocess.run([sys.executable, program, *sys.argv[1:], "--worker", str(threads)], check=False, stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads), "GLOG_minloglevel": "2"})
        if done.returncode:
            raise SystemExit(done.returncode)               # the process has said why
        runs.append(json.loads(done.stdout))
    waiting = {name: os.environ.get(name, "") for name in WAITING}
    return {"device": args.device, "waiting": waiting, "date": datetime.now(UTC).date().isoformat(), "runs": runs, **machine(),
            **environment("torchcaffe", args.device), **commit()}


def _observed(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """What `work` finds with args.worker threads, the machine's rates, and how many cores other programs kept busy meanwhile."""
    caffe.set_threads(args.worker)
    if args.device == "gpu":
        caffe.set_mode_gpu()
        torch.cuda.init()
    before, own, start = busy_seconds(), sum(os.times()[:4]), time.perf_counter()
    found = {"threads": args.worker, "rates": measured_rates(), **work(args)}
    after = busy_seconds()
    if before is not None and after is not None:
        found["other_cores"] = (after - before - (sum(os.times()[:4]) - own)) / (time.perf_counter() - start)
    return found


def rendered(page: str, name: str, tables: str) -> str:
    """The page with a program's tables between its two marks."""
    begin, end = f"<!-- written by benchmarks/{name}.py -->", "<!-- end -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n{tables}{end}{rest.split(end, 1)[1]}"


# -- showing -----------------------------------------------------------------------------------------------------------------
def table(*rows: list[str]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def spread(values: list[float], digits: str) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return f"{median(values):{digits}} ({low:{digits}} to {high:{digits}})"


def verdict(met: bool, shown: str) -> str:
    return f"{shown}: {'met' if met else 'missed'}"


def rate_table(result: dict[str, Any]) -> str:
    """The rates that floors are made of."""
    head = ["threads", "sgemm, 1024 x 1024", "64-channel 3x3 convolution, 32 images of 32x32", "copy, read and written"]
    return table(head, *([str(run["threads"]), f"{run['rates']['sgemm'] / 1e9:.0f} GFLOP/s", f"{run['rates']['conv'] / 1e9:.0f} GFLOP/s",
                          f"{run['rates']['copy'] / 1e9:.1f} GB/s"] for run in result["runs"]))


def evidence(result: dict[str, Any], how: str) -> str:
    """Machine, versions and date, how it was measured, and what may have disturbed the figures."""
    where = "{gpu}" if result["device"] == "gpu" else "{cpu}, {cores} cores, {instructions}"
    text = (f"{{machine}}, {where}; Python {{python}}, torch {{torch}}, {{engine}}, commit {{commit:.7}}, {{date}}; {how}.\n"
            ).format_map({**result, "commit": str(result["commit"])})
    warnings = [f"On {run['threads']} thread(s) other programs kept {run['other_cores']:.2f} cores busy: measure again on a quiet machine."
                for run in result["runs"] if run.get("other_cores", 0) > 0.1]
    warnings += [f"{name} was {result['waiting'][name] or 'not set'}, not {value}." for name, value in WAITING.items()
                 if result["waiting"][name].lower() != value]
    if result["dirty"]:
        warnings.append("The sources differed from the commit.")
    return "\n".join([text, *(f"**{warning}**\n" for warning in warnings)])
