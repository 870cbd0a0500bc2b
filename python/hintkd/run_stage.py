"""The stage program: runs stage folders inside any caffe's interpreter, with numpy alone beside that caffe.

    python -m hintkd.run_stage FOLDER...     run these folders, one after the other
    python -m hintkd.run_stage --serve       run the folders named on standard input, answering each with one line of JSON

A folder says all that decides its outcome: solver.prototxt, net.prototxt, stage.json and, if it starts from weights,
init.caffemodel.  The program leaves log.txt (Caffe's own log), the final snapshot and, last, result.json: a stage is finished if and
only if that file is there.  Killed at any moment and started again, a stage ends with the same bytes on torchcaffe; a real Caffe
starts its data at row 0 when it restores, so there the stage starts again.  Which stage runs when is the runner's business.
"""
from __future__ import annotations

import ctypes
import fcntl
import glob
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import numpy as np

from hintkd.backend import environment, load_caffe
from hintkd.errors import UserError
from hintkd.files import read_json, write_json, written
from hintkd.log_parser import START_LINE, parse

FAILURE = "failure.json"                    # why the stage failed when it was last tried
KEPT = 2                                    # snapshots that stay while a stage runs: one may turn out to be unusable


class StageFailed(UserError):
    """A stage cannot be finished; the sentence says at which iteration and where its log is."""


def run(folder: str) -> dict[str, Any]:
    """Run the stage in `folder` to its end and return its result.json; a finished stage is not run again.

    No folder has two writers: while another process runs the stage, this one waits and then takes its result.
    Raises StageFailed, or what caffe raises.
    """
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = os.path.join(folder, "result.json")
        if not os.path.exists(result):
            stage = read_json(os.path.join(folder, "stage.json"))
            remove(os.path.join(folder, FAILURE))
            with output_to(os.path.join(folder, "log.txt")):
                write_json(result, PROGRAMS[stage["program"]](folder, stage))
        return read_json(result)


# ---------------------------------------------------------------------------------------------------------------- programs

def solve(folder: str, stage: dict[str, Any]) -> dict[str, Any]:
    """Train with the folder's solver, then measure the saved weights in the TEST net over the whole test set."""
    caffe = prepare(stage)
    found = environment(stage["backend"], stage["device"])
    solver, progress = begin(caffe, folder, stage, found)
    clock, spent, total = time.time(), progress["wall_s"], stage["iterations"]
    say(START_LINE.format(stage["title"], solver.iter))
    while solver.iter < total:
        every = stage["snapshot"] or total
        solver.step(min(total, (solver.iter // every + 1) * every) - solver.iter)
        require_finite(solver, folder)
        progress.update(iteration=solver.iter, wall_s=spent + time.time() - clock)
        write_json(os.path.join(folder, "progress.json"), progress)
        prune(folder, KEPT)
    solver.solve()                          # Caffe's own end of a run: the last snapshot, one more forward pass, one more test
    del solver
    final = snapshot(folder, total, "caffemodel")
    outputs = measure(caffe, folder, final, stage)
    prune(folder, 1)
    return {"schema": 1, "title": stage["title"], "key": stage["key"], "iterations": total, "outputs": outputs,
            "weights": os.path.basename(final), "wall_s": spent + time.time() - clock, "started": progress["started"], "finished": now(),
            "resumed": progress["resumed"], "inexact": progress["inexact"], "environment": found, "machine": machine()}


def probe(folder: str, stage: dict[str, Any]) -> dict[str, Any]:
    """Train a few iterations and test once or twice, for the time these take; nothing is kept."""
    caffe = prepare(stage)
    solver = caffe.get_solver(os.path.join(folder, "solver.prototxt"))
    if hasattr(caffe, "ENGINE"):
        solver.fast = stage["fast"]
    values = sum(blob.data.size for blobs in solver.net.params.values() for blob in blobs)
    advance(solver, 2)
    train = timed(lambda: advance(solver, 1), stage["seconds"])
    test = 0.0
    if stage["test_iter"]:
        net = caffe.Net(os.path.join(folder, "net.prototxt"), caffe.TEST)
        net.forward()
        test = timed(net.forward, stage["seconds"] / 4) * stage["test_iter"]
    return {"train_s": train, "test_s": test, "weights_bytes": 4 * values}


PROGRAMS = {"solve": solve, "probe": probe}


# ------------------------------------------------------------------------------------------------------------- their steps

def prepare(stage: dict[str, Any]) -> Any:
    """The caffe that the stage names, set to the stage's device and number of threads."""
    caffe = load_caffe(stage["backend"])
    if hasattr(caffe, "ENGINE"):
        caffe.set_threads(stage["threads"])
    if stage["device"] == "gpu":
        caffe.set_device(stage["device_id"])
        caffe.set_mode_gpu()
    else:
        caffe.set_mode_cpu()
    return caffe


def begin(caffe: Any, folder: str, stage: dict[str, Any], found: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """The stage's solver at the iteration where it goes on, and what is known of its past.

    torchcaffe continues from the newest snapshot whose sidecar fits, byte for byte; where there is none, and on a real Caffe, the stage
    starts from init.caffemodel.  Raises StageFailed if it was begun by other versions or on another kind of processor, which would
    change the last bits; where stage.json allows that, it goes on as Caffe does, with its data at row 0.
    """
    path = os.path.join(folder, "progress.json")
    torchcaffe = hasattr(caffe, "ENGINE")

    def new_solver(exact: bool = True) -> Any:
        solver = caffe.get_solver(os.path.join(folder, "solver.prototxt"))
        if torchcaffe:
            solver.fast, solver.exact = stage["fast"], exact
        return solver

    if torchcaffe and snapshots(folder):
        progress = read_json(path)
        changed = [f"{name} {progress['environment'].get(name)} -> {value}" for name, value in sorted(found.items())
                   if name != "python" and progress["environment"].get(name) != value]
        if changed and not stage["inexact"]:
            raise StageFailed(f"{folder} was begun with other numerics ({', '.join(changed)}), so that it could not end with the same "
                              "bytes: delete the folder to start the stage again, or give --inexact to go on all the same")
        progress.update(inexact=progress["inexact"] or bool(changed), resumed=progress["resumed"] + 1)
        for state in snapshots(folder):
            solver = new_solver(exact=not changed)
            try:
                solver.restore(state)
            except caffe.SidecarError as error:
                say(f"Cannot go on from {state}: {error}")
                continue
            if changed:
                solver.exact = True
            progress["environment"] = found
            write_json(path, progress)
            return solver, progress
    for state in snapshots(folder):
        drop(state)
    progress = {"environment": found, "started": now(), "iteration": 0, "wall_s": 0.0, "resumed": 0, "inexact": False}
    write_json(path, progress)
    solver = new_solver()
    init = os.path.join(folder, "init.caffemodel")
    if os.path.exists(init):
        solver.net.copy_from(init)
    return solver, progress


def require_finite(solver: Any, folder: str) -> None:
    """Raise StageFailed, with the iteration where the log first shows it, if an output or a weight is not a finite number."""
    blobs = {name: solver.net.blobs[name] for name in solver.net.outputs}
    blobs.update((f"{name} (weights)", blob) for name, params in solver.net.params.items() for blob in params)
    bad = [name for name, blob in blobs.items() if not np.isfinite(blob.data).all()]
    if bad:
        flush()
        with open(os.path.join(folder, "log.txt")) as file:
            shown = [iteration for iteration, loss in parse(file.read()).loss if not np.isfinite(loss)]
        when = f"at iteration {shown[0]}" if shown else f"before iteration {solver.iter}"
        raise StageFailed(f"the training diverged {when}: {bad[0]} is not a finite number (see {folder}/log.txt)")


def measure(caffe: Any, folder: str, weights: str, stage: dict[str, Any]) -> dict[str, float]:
    """Every output of the TEST net with these weights, averaged over test_iter batches; none for a net that is not tested.

    An output of several elements gives name, name[1], name[2] ...  The blobs that the stage names as class scores and labels are kept
    in predictions.npz.  Raises StageFailed if an output is not finite.
    """
    if not stage["test_iter"]:
        return {}
    net = caffe.Net(os.path.join(folder, "net.prototxt"), caffe.TEST)
    net.copy_from(weights)
    sums: dict[str, float] = {}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in stage["predictions"]}
    for _ in range(stage["test_iter"]):
        for name, value in net.forward().items():
            for index, element in enumerate(np.asarray(value, dtype=np.float64).flat):
                label = f"{name}[{index}]" if index else name
                sums[label] = sums.get(label, 0.0) + element
        for name, batches in kept.items():
            batches.append(np.array(net.blobs[stage["predictions"][name]].data))
    bad = [name for name, total in sums.items() if not np.isfinite(total)]
    if bad:
        raise StageFailed(f"the test output {bad[0]} of {weights} is not a finite number (see {folder}/log.txt)")
    if kept:
        write_arrays(os.path.join(folder, "predictions.npz"), {name: np.concatenate(batches) for name, batches in kept.items()})
    return {name: float(total / stage["test_iter"]) for name, total in sums.items()}


def advance(solver: Any, iterations: int) -> None:
    """Step, and wait until a GPU is done with it."""
    solver.step(iterations)
    for name in solver.net.outputs:
        np.isfinite(solver.net.blobs[name].data)


def timed(work: Any, budget: float) -> float:
    """Median seconds of one call, over as many calls as fit the budget in seconds, at least three."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 100):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def machine() -> dict[str, Any]:
    """The kind of machine this runs on."""
    model = platform.processor()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return {"machine": f"{platform.system()} {platform.machine()}", "cpu": model, "cores": os.cpu_count()}


# --------------------------------------------------------------------------------------------------------------- snapshots

def snapshot(folder: str, iteration: int | str, kind: str) -> str:
    """The file that Caffe writes for a snapshot; kind is caffemodel or solverstate."""
    return os.path.join(folder, f"snapshot_iter_{iteration}.{kind}")


def snapshots(folder: str) -> list[str]:
    """The solver states in the folder, newest first."""
    return sorted(glob.glob(snapshot(glob.escape(folder), "*", "solverstate")), key=iteration_of, reverse=True)


def iteration_of(path: str) -> int:
    """The iteration in a snapshot's name."""
    found = re.search(r"_iter_(\d+)\.", path)
    assert found, path
    return int(found[1])


def prune(folder: str, keep: int) -> None:
    """Delete all snapshots but the newest `keep`."""
    for state in snapshots(folder)[keep:]:
        drop(state)


def drop(state: str) -> None:
    """Delete a snapshot: first its state, without which the other files mean nothing."""
    os.remove(state)
    for path in glob.glob(glob.escape(state[:-len("solverstate")]) + "*"):
        remove(path)


# ------------------------------------------------------------------------------------------------------------------- files

def remove(path: str) -> None:
    """Delete a file if it is there."""
    with suppress(FileNotFoundError):
        os.remove(path)


def write_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file that appears whole or not at all."""
    with written(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def now() -> str:
    """The time as in 2024-05-17T12:30:00+0000."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime())


def say(text: str) -> None:
    """A line of our own in Caffe's log, with glog's prefix."""
    micros = int(time.time() % 1 * 1e6)
    print(f"I{time.strftime('%m%d %H:%M:%S')}.{micros:06d} {os.getpid():5d} run_stage.py:1] {text}", file=sys.stderr, flush=True)


def flush() -> None:
    """Send what was printed on its way."""
    sys.stdout.flush()
    sys.stderr.flush()


@contextmanager
def output_to(path: str) -> Iterator[None]:
    """Append all that this process prints, C++ included, to a file; an error that leaves the block with its traceback."""
    flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        with open(path, "a", buffering=1, encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                yield
            except Exception:
                traceback.print_exc()
                raise
    finally:
        for stream, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, stream)
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------- command

def answer(folder: str) -> str | None:
    """Run a folder; the error, if any, as one sentence, which is also kept in the folder."""
    try:
        run(folder)
    except UserError as error:
        sentence = str(error)
    except Exception as error:  # noqa: BLE001  whatever a Python layer raises; its traceback is in the log
        kind = "" if type(error).__name__ == "CaffeError" else f"{type(error).__name__}: "
        sentence = f"{kind}{error} (see {folder}/log.txt)"
    else:
        return None
    if os.path.isdir(folder):
        write_json(os.path.join(folder, FAILURE), sentence)
    return sentence


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the one that started it is gone, however that ended."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def serve() -> None:
    """Answer each folder named on standard input, until that is closed."""
    for line in sys.stdin:
        print(json.dumps({"error": answer(line.rstrip("\n"))}), flush=True)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments[0] == "--serve":
        die_with(int(arguments[1]))
        serve()
        return 0
    errors = [error for error in map(answer, arguments) if error]
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main(sys.argv[1:]))
