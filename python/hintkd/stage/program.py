"""The programs of stages, and the stage process, which runs stage folders by them in any caffe's interpreter that has numpy.

    python -m hintkd.stage.program FOLDER...                run these folders, one after the other
    python -m hintkd.stage.program --together FOLDER...     run these folders as the group that their stage.json name, side by side
    python -m hintkd.stage.program --serve PARENT           run what each line of standard input names, a JSON list of one folder or of a
                                                        group, answer it with one line of JSON, and die with the process PARENT

A folder says all that decides its outcome: solver.prototxt, net.prototxt, stage.json and, if it starts from weights,
init.caffemodel.  Its program leaves log.txt (Caffe's own log), the final snapshot and, last, result.json: a stage is finished if and
only if that file is there.  Killed at any moment and started again, a stage ends with the same bytes on torchcaffe; a real Caffe
starts its data at row 0 when it restores, so there the stage starts again.  A group fails with the first of its stages that does.
Which stage runs when is the runner's business.
"""
from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import numpy as np

from hintkd.backend import environment, load_caffe
from hintkd.errors import Damaged, StageFailed, UserError
from hintkd.files import read_sealed, sha256_of, write_json, write_sealed, written
from hintkd.stage.group import KEPT, Member, begin, now, prune, remove, snapshot
from hintkd.stage.log import START_LINE, parse

IN_A_ROW = 50                               # iterations that are timed together on a GPU, where a call of step() waits for it many times
FAILURE = "failure.json"                    # why the stage failed when it was last tried
UNSIGNED = ("lock", "result.json", FAILURE)     # files whose digests a result does not hold
AGAIN = "give the same command again, which writes it again"


def silent(sentence: str) -> None:
    """A listener that does not care."""


def run(folder: str) -> dict[str, Any]:
    """Run the stage in `folder` to its end and return its result.json; a finished stage is not run again.

    No folder has two writers: while another process runs the stage, this one waits and then takes its result.
    Raises StageFailed, or what caffe raises.
    """
    return run_together([folder])[0]


def run_together(folders: Sequence[str], tell: Callable[[str], None] = silent) -> list[dict[str, Any]]:
    """The same for a group of stages, side by side; `tell` gets a sentence for each file that is damaged, and what is done about it."""
    with ExitStack() as held:
        for folder in sorted(folders):
            lock = held.enter_context(open(os.path.join(folder, "lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        results = [result_of(folder, tell) for folder in folders]
        if not all(results):
            stages = list(map(stage_of, folders))
            require_group(folders, stages)
            for folder in folders:
                remove(os.path.join(folder, FAILURE))
            logs = [os.path.join(folder, "log.txt") for folder in folders]
            with output_to(logs[0]), ExitStack() as opened:
                files = [opened.enter_context(open(log, "a", buffering=1, encoding="utf-8")) for log in logs]
                members = [Member(folder, stage, log, tell) for folder, stage, log in zip(folders, stages, files)]
                contents = PROGRAMS[stages[0]["program"]](members)
            for folder, stage, content in zip(folders, stages, contents):
                write_sealed(os.path.join(folder, "result.json"), {**content, "digests": digests(folder, stage.get("parts", ("",)))})
            results = [result_of(folder, tell) for folder in folders]
        return [result for result in results if result is not None]


def result_of(folder: str, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """What a finished stage left; a damaged result is deleted, so that the stage goes on from its last snapshot."""
    path = os.path.join(folder, "result.json")
    if not os.path.exists(path):
        return None
    try:
        return read_sealed(path)
    except Damaged as damage:
        tell(f"{damage}; the stage is taken up again")
        os.remove(path)
        return None


def stage_of(folder: str) -> dict[str, Any]:
    """The folder's stage.json.  Raises StageFailed if it is damaged."""
    try:
        return read_sealed(os.path.join(folder, "stage.json"), "key", "group", "program")
    except Damaged as damage:
        raise StageFailed(f"{damage}; {AGAIN}") from None


def digests(folder: str, parts: Iterable[str] = ("",)) -> dict[str, str]:
    """SHA-256 of each file that a finished stage leaves, in its folder and in those of its parts."""
    names = sorted(os.path.join(part, name) for part in {"", *parts} for name in os.listdir(os.path.join(folder, part)))
    return {name: sha256_of(os.path.join(folder, name)) for name in names
            if name not in UNSIGNED and not os.path.basename(name).startswith(".") and os.path.isfile(os.path.join(folder, name))}


def require_group(folders: Sequence[str], stages: list[dict[str, Any]]) -> None:
    """Raise StageFailed if the folders are not the group that their stage.json name."""
    keys = [stage["key"] for stage in stages]
    for folder, stage in zip(folders, stages):
        if stage["group"] != keys:
            wanted = ", ".join(key[:12] for key in stage["group"])
            raise StageFailed(f"{folder}/stage.json names the group {wanted}: give the folders of these keys, in this order")


# ---------------------------------------------------------------------------------------------------------------- programs

def solve(members: list[Member]) -> list[dict[str, Any]]:
    """Train with the folders' solvers, then measure the saved weights in the TEST nets over the whole test set."""
    stage = members[0].stage
    caffe = prepare(stage)
    if len(members) > 1 and not hasattr(caffe, "ENGINE"):
        raise StageFailed("a real Caffe trains one stage at a time: leave --together away")
    found = environment(stage["backend"], stage["device"])
    begin(caffe, members, found)
    for member in members:
        member.say(START_LINE.format(member.stage["title"], member.solver.iter))
    train(caffe, members)
    results = []
    for member in members:
        final = snapshot(member.folder, stage["iterations"], "caffemodel")
        with member.turn():
            outputs = measure(caffe, member.folder, final, member.stage)
        prune(member.folder, 1)
        results.append({
            "schema": 1, "title": member.stage["title"], "key": member.stage["key"], "iterations": stage["iterations"], "outputs": outputs,
            "weights": os.path.basename(final), "wall_s": time.time() - member.clock, "started": member.progress["started"],
            "finished": now(), "resumed": member.progress["resumed"], "inexact": member.progress["inexact"], "together": len(members),
            "environment": found, "machine": machine()})
    return results


def train(caffe: Any, members: list[Member]) -> None:
    """Take all members from the iteration where they are to their last, snapshot by snapshot."""
    stage, solver = members[0].stage, members[0].solver
    total, every = stage["iterations"], stage["snapshot"] or stage["iterations"]
    step = solver.step
    if len(members) > 1:
        step = caffe.Together([member.solver for member in members], lambda number: members[number].turn()).step
    while solver.iter < total:
        step(min(total, (solver.iter // every + 1) * every) - solver.iter)
        for member in members:
            require_finite(member.solver, member.folder)
        for member in members:
            prune(member.folder, KEPT)
            member.note(iteration=solver.iter)
    for member in members:                  # Caffe's own end of a run: the last snapshot, one more forward pass, one more test
        with member.turn():
            member.solver.solve()
        member.solver = None


def probe(members: list[Member]) -> list[dict[str, Any]]:
    """Train a few iterations and test once or twice, for the time these take; nothing is kept."""
    (member,) = members
    stage, caffe = member.stage, prepare(member.stage)
    count = IN_A_ROW if stage["device"] == "gpu" else 1

    def iterations(most: int = 100) -> list[float]:
        """What one takes, behind the first two, in each of several calls."""
        member.build(caffe)
        advance(member.solver, 2)
        return [seconds / count for seconds in timed(lambda: advance(member.solver, count), stage["seconds"], most)]
    train_s = iterations()
    solver, remembered = member.solver, None
    memory = getattr(solver, "memory", None)
    if memory is not None:                  # a second solver that has the same draws asks what the first one has asked
        remembered = {"kind": memory.kind, "inputs": memory.count, "variants": memory.variants, "batch": memory.batch,
                      "bytes": memory.bytes, "recalled_s": float(np.median(iterations(len(train_s))))}
    values = sum(blob.data.size for blobs in solver.net.params.values() for blob in blobs)
    test_s = 0.0
    if stage["test_iter"]:
        net = caffe.Net(member.path("net.prototxt"), caffe.TEST)
        net.forward()
        test_s = float(np.median(timed(net.forward, stage["seconds"] / 4))) * stage["test_iter"]
    return [{"train_s": float(np.median(train_s)), "test_s": test_s, "weights_bytes": 4 * values, "memory": remembered}]


def test(members: list[Member]) -> list[dict[str, Any]]:
    """Measure trained weights, which stage.json names, in the TEST net over the whole test set."""
    (member,) = members
    stage = member.stage
    caffe = prepare(stage)
    outputs = measure(caffe, member.folder, stage["weights"], stage)
    return [{"outputs": outputs, "environment": environment(stage["backend"], stage["device"])}]


PROGRAMS = {"solve": solve, "probe": probe, "test": test}


# ------------------------------------------------------------------------------------------------------------- their steps

def prepare(stage: dict[str, Any]) -> Any:
    """The caffe that the stage names, set to the stage's device, number of threads and precision."""
    caffe = load_caffe(stage["backend"])
    if hasattr(caffe, "ENGINE"):
        caffe.set_threads(stage["threads"])
        caffe.set_precision(stage["precision"])
    if stage["device"] == "gpu":
        caffe.set_device(stage["device_id"])
        caffe.set_mode_gpu()
    else:
        caffe.set_mode_cpu()
    return caffe


def require_finite(solver: Any, folder: str) -> None:
    """Raise StageFailed, with the iteration where the log first shows it, if an output or a weight is not a finite number."""
    blobs = {name: solver.net.blobs[name] for name in solver.net.outputs}
    blobs.update((f"{name} (weights)", blob) for name, params in solver.net.params.items() for blob in params)
    bad = [name for name, blob in blobs.items() if not np.isfinite(blob.data).all()]
    if bad:
        flush()
        with open(os.path.join(folder, "log.txt"), encoding="utf-8", errors="replace") as file:
            shown = [iteration for iteration, loss in parse(file.read()).loss if not np.isfinite(loss)]
        when = f"at iteration {shown[0]}" if shown else f"before iteration {solver.iter}"
        raise StageFailed(f"the training diverged {when}: {bad[0]} is not a finite number (see {folder}/log.txt)")


def measure(caffe: Any, folder: str, weights: str, stage: dict[str, Any]) -> dict[str, float]:
    """Every output of the TEST net with these weights, averaged over test_iter batches; none for a net that is not tested.

    An output of several elements gives name, name[1], name[2] ...  The blobs that the stage names as class scores and labels are kept
    in predictions.npz.  Whatever precision the stage was trained in, this is float32 arithmetic, layer by layer.
    Raises StageFailed if an output is not finite.
    """
    if not stage["test_iter"]:
        return {}
    if hasattr(caffe, "ENGINE"):
        caffe.set_precision("fp32")
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


def timed(work: Any, budget: float, most: int = 100) -> list[float]:
    """Seconds of each call, for as many calls as fit the budget in seconds, at least three and at most so many."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def machine() -> dict[str, Any]:
    """The kind of machine this runs on."""
    model = platform.processor()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return {"machine": f"{platform.system()} {platform.machine()}", "cpu": model, "cores": os.cpu_count()}


# ------------------------------------------------------------------------------------------------------------------- files

def write_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file that appears whole or not at all."""
    with written(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


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
            except (Exception, SystemExit):
                traceback.print_exc()
                raise
    finally:
        for stream, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, stream)
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------- command

def answer(folders: Sequence[str], tell: Callable[[str], None]) -> str | None:
    """Run a folder or a group; the error, if any, as one sentence, which is also kept in the folders."""
    try:
        run_together(folders, tell)
    except UserError as error:
        sentence = str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a Python layer raises; its traceback is in the log
        sentence = f"{words(error)} (see {folders[0]}/log.txt)"
    else:
        return None
    for folder in filter(os.path.isdir, folders):
        write_json(os.path.join(folder, FAILURE), sentence)
    return sentence


def words(error: BaseException) -> str:
    """An error for people: what the engine says of its input as it is, anything else by its first line and where it came up."""
    if any(kind.__name__ == "CaffeError" for kind in type(error).__mro__):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory is full: fewer --jobs or a smaller batch need less"
    said = (str(error).strip().splitlines() or ["something went wrong that has no name"])[0]
    if isinstance(error, SystemExit):
        said = f"sys.exit({error.code!r}) was called"
    where = traceback.extract_tb(error.__traceback__)[-1]
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))         # torchcaffe's: which layer raised it
    return f"{said}, at {os.path.basename(where.filename)}:{where.lineno}{notes}"


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the one that started it is gone, however that ended."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def serve() -> None:
    """Answer each list of folders on standard input, until that is closed."""
    for line in sys.stdin:
        told: list[str] = []
        error = answer(json.loads(line), told.append)
        print(json.dumps({"error": error, "told": told}), flush=True)


def main(arguments: list[str]) -> int:
    if arguments in ([], ["--together"]):
        print(__doc__, file=sys.stderr)
        return 2
    for name in [name for name in os.environ if name.startswith("GLOG_")]:
        del os.environ[name]                # results are read from the log, which therefore is whole whatever the caller has silenced
    if arguments[0] == "--serve":
        die_with(int(arguments[1]))
        serve()
        return 0
    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr)
    groups = [arguments[1:]] if arguments[0] == "--together" else [[folder] for folder in arguments]
    errors = [error for error in (answer(group, tell) for group in groups) if error]
    for error in errors:
        tell(error)
    return 1 if errors else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main(sys.argv[1:]))
