"""What a run will take: a few iterations of each distinct net, measured on this device, and the plan played through.

Nets are measured as they will run, as many side by side as the executor takes, so that what they cost each other counts; what stages gain
that train together does not.  Finished stages cost nothing and half-finished ones their rest.  A net whose process is killed while it is
measured is measured once more, and if that is killed, too, the run goes on without its time.
"""
from __future__ import annotations

import hashlib
import heapq
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import Damaged, ProcessDied, StageFailed, UserError
from hintkd.files import read_sealed, write_file, write_json
from hintkd.run.executor import Interpreter, run_folders
from hintkd.run.mend import held
from hintkd.run.plan import Plan, Task, ranks
from hintkd.run.remembering import Memory, file_of, shares_asked

PROBE_S = 0.5                               # how long each net is measured, seconds, beside its construction
TRIES = 2                                   # how often a net is measured whose process is killed
LOG = Path("runs/estimate-log.txt")         # of the last net that could not be measured, relative to the workspace
EXTRA_BYTES = 500_000                       # of a stage's log and prototxts, about


@dataclass(frozen=True)
class Cost:
    """Of one net: seconds for a training iteration, seconds for one whole test, bytes of all its weights, what of it is remembered."""
    train_s: float
    test_s: float
    weights_bytes: int
    memory: Memory | None = None


@dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    seconds       task key -> what is left of it
    total_s       all of the plan, `jobs` of it side by side
    bytes         added on the disk, at most
    is_whole      whether every net could be measured
    remembered    of the bytes those for what teachers have said; where the disk has no room for them, stages run without
    """
    seconds: dict[str, float]
    total_s: float
    jobs: int
    bytes: int
    is_whole: bool = True
    remembered: int = 0

    def of(self, task: Task) -> float:
        return self.seconds.get(task.key, 0.0)


def estimate(plan: Plan, executor: Any, interpreter: Interpreter, device_id: int = 0, tell: Callable[[str], None] = print) -> Estimate:
    """Measure and add up; `tell` gets a sentence for each net that cannot be measured.

    Raises UserError if a net cannot be built or the disk is too small.
    """
    tasks, jobs = plan.unfinished(), executor.slots
    costs = measure(plan, executor, interpreter, device_id, tell)
    cost = {key: costs[digest] for key, task in plan.tasks.items() if (digest := net_digest(task)) in costs}
    memories = {key: each.memory for key, each in cost.items() if each.memory}
    asked = shares_asked(plan, memories)
    known = [(task, cost[task.key]) for task in tasks if task.key in cost]
    seconds = {task.key: left(task) * duration(task, cost, asked.get(task.key, 1.0)) for task, cost in known}
    remembered = sum({file_of(plan, plan.tasks[key], memory): memory.bytes for key, memory in memories.items()}.values())
    kept = sum(disk(task, cost) for task, cost in known)
    most = kept + jobs * max((4 * cost.weights_bytes for _, cost in known), default=0)     # snapshots of stages that run
    free = shutil.disk_usage(".").free
    if most > free:
        raise UserError(f"the run needs about {most / 1e9:.1f} GB of disk in {Path.cwd()}, where {free / 1e9:.1f} GB are free: make room")
    return Estimate(seconds, makespan(plan, seconds, jobs), jobs, most + remembered, len(known) == len(tasks), remembered)


def measure(plan: Plan, executor: Any, interpreter: Interpreter, device_id: int, tell: Callable[[str], None]) -> dict[str, Cost]:
    """The cost of each distinct net of the unfinished tasks, by net_digest, without those that cannot be measured by themselves."""
    distinct = {net_digest(task): task for task in plan.unfinished() if len(task.stage.parts) == 1}
    costs: dict[str, Cost] = {}
    with probe_folders(distinct, plan, device_id) as folders:
        for attempt in range(TRIES):
            futures = {digest: executor.submit(run_folders, [str(folder)], interpreter) for digest, folder in folders.items()
                       if digest not in costs}
            for digest, future in futures.items():
                try:
                    future.result()
                except ProcessDied as died:
                    if attempt + 1 == TRIES:
                        tell(f"{distinct[digest].stage.title} cannot be measured: {moved_log(folders[digest], died)}; the run goes on "
                             "without its time")
                    continue
                except StageFailed as failed:
                    raise UserError(f"{distinct[digest].stage.title}: {moved_log(folders[digest], failed)}") from None
                found = read_sealed(folders[digest] / "result.json")
                costs[digest] = Cost(found["train_s"], found["test_s"], found["weights_bytes"],
                                     Memory(**found["memory"]) if found["memory"] else None)
    return costs


def moved_log(folder: Path, failed: StageFailed) -> str:
    """The sentence of a failure, with the log that it names where it stays when the folder is gone."""
    if (folder / "log.txt").exists():
        shutil.copyfile(folder / "log.txt", LOG)
    return str(failed).replace(f"{folder}/log.txt", str(LOG))


def clear() -> None:
    """Delete what estimates left that were killed."""
    for root in Path("runs").glob("estimate-*/"):
        with held(root) as free:
            if free or not (root / "lock").exists():
                shutil.rmtree(root, ignore_errors=True)


@contextmanager
def probe_folders(tasks: dict[str, Task], plan: Plan, device_id: int) -> Iterator[dict[str, Path]]:
    """Stage folders, for as long as they are needed, that measure the tasks' nets: no display, no test, no snapshot."""
    root = Path("runs") / f"estimate-{os.getpid()}"
    numerics, folders = plan.numerics, {}
    clear()
    root.mkdir(parents=True, exist_ok=True)
    (root / "lock").touch()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        stack.enter_context(held(root))
        for digest, task in tasks.items():
            folder = folders[digest] = root / digest[:12]
            solver = caffe_pb2.SolverParameter()
            solver.CopyFrom(task.stage.solver)
            for name in ("display", "snapshot", "test_iter", "test_interval", "test_initialization"):
                solver.ClearField(name)
            solver.net, solver.snapshot_prefix = str(folder / "net.prototxt"), str(folder / "snapshot")
            solver.solver_mode = solver.GPU if numerics.device == "gpu" else solver.CPU
            write_file(folder / "net.prototxt", write_text(task.stage.net))
            write_file(folder / "solver.prototxt", write_text(solver))
            write_json(folder / "stage.json", {
                "program": "probe", "title": task.stage.title, "backend": numerics.backend, "device": numerics.device,
                "device_id": device_id, "threads": numerics.threads, "precision": numerics.precision, "key": digest,
                "remember": str(folder / "remembered"), "group": [digest], "seconds": PROBE_S,
                "test_iter": sum(task.stage.solver.test_iter)})
        yield folders


def net_digest(task: Task) -> str:
    """Equal for tasks whose iterations cost the same: the net, whatever its seed, rate and length."""
    return hashlib.sha256(b"".join(part.net.SerializeToString(deterministic=True) + str(part.solver.iter_size).encode()
                                   for part in task.stage.parts)).hexdigest()


def duration(task: Task, cost: Cost, asked: float) -> float:
    """Seconds for the whole stage: iterations, the tests on the way and the one at the end; `asked`: as shares_asked says."""
    solver = task.stage.solver
    train_s = cost.memory.recalled_s + asked * (cost.train_s - cost.memory.recalled_s) if cost.memory else cost.train_s
    tests = 1 + (solver.max_iter // solver.test_interval if solver.test_interval else 0)
    return solver.max_iter * train_s + tests * cost.test_s


def left(task: Task) -> float:
    """The share of a task that is still to be done, by its last snapshot."""
    with suppress(Damaged):
        return 1 - task.progress("iteration")["iteration"] / task.iterations
    return 1.0


def disk(task: Task, cost: Cost) -> int:
    """Bytes that a finished stage keeps: weights in, the final snapshot with its solver state, weights out."""
    return (3 + bool(task.stage.weights_in)) * cost.weights_bytes + EXTRA_BYTES


def makespan(plan: Plan, seconds: dict[str, float], jobs: int) -> float:
    """When the last task ends if `jobs` run side by side, the one with the longest chain behind it first."""
    rank = ranks(plan, lambda task: seconds.get(task.key, 0.0))
    ends: dict[str, float] = {}
    free = [0.0] * jobs
    todo = [task for task in plan.tasks.values() if task.key in seconds]

    def ready_at(task: Task) -> float:
        return max((ends.get(source, 0.0) for source in task.sources), default=0.0)

    while todo:
        ready = [task for task in todo if all(source in ends or source not in seconds for source in task.sources)]
        task = min(ready, key=lambda task: (max(ready_at(task), free[0]), -rank[task.key]))
        ends[task.key] = max(heapq.heappop(free), ready_at(task)) + seconds[task.key]
        heapq.heappush(free, ends[task.key])
        todo.remove(task)
    return max(ends.values(), default=0.0)
