"""From a table to its records: every net of every row becomes a Run, the runs' stages a plan, and what comes out records.

A request, which is all that `hintkd reproduce` was asked for, is kept in runs/requests, so that `hintkd status` can say what has been
done of it.  The demo is a request like any other.  What a table is stands in table.py; how stages run is the runner's business.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from hintkd import backend, limits
from hintkd.errors import Damaged, UserError
from hintkd.files import fault, is_whole, read_sealed, write_file, write_sealed
from hintkd.methods.method import stages_of
from hintkd.metrics import METRICS
from hintkd.run.cluster import Cluster
from hintkd.run.committed import WEIGHTS, Committed
from hintkd.run.digests import restore_descriptions
from hintkd.run.estimate import Estimate, clear, estimate
from hintkd.run.executor import Interpreter, LocalExecutor
from hintkd.run.keys import Numerics
from hintkd.run.mend import mend
from hintkd.run.plan import Plan, Task
from hintkd.run.progress import Bars, clock, counted, warn
from hintkd.run.runner import Runner
from hintkd.run.scalars import Scalars
from hintkd.study import record
from hintkd.study.record import Run
from hintkd.study.table import Table, find_table, load_table, table_names

REQUESTS = Path("runs/requests")            # relative to the workspace, which is the current directory
MOST_CORES = 256                            # of a machine elsewhere
GPU_JOBS = 2                                # stages side by side on a GPU: these nets do not fill one, their launches do


@dataclass(frozen=True)
class Resources:
    """What a request is run with.  `numerics` is part of the stages' keys; the rest is not.

    jobs         stages side by side, on a cluster at most; None there for as many as its workers have threads
    device_id    which GPU
    scheduler    the address of a dask scheduler whose workers run the stages; None runs them here
    inexact      go on with stages that were begun with other numerics
    """
    numerics: Numerics
    interpreter: Interpreter
    jobs: int | None
    device_id: int = 0
    inexact: bool = False
    scheduler: str | None = None

    def executor(self) -> LocalExecutor | Cluster:
        """Where the stages run; used in a `with`."""
        return Cluster(self.scheduler, self.jobs) if self.scheduler else LocalExecutor(self.jobs or 1)


def resources(name: str = "torchcaffe", caffe_python: str | None = None, device: str | None = None, threads: int = 1,
              jobs: int | None = None, inexact: bool = False, precision: str = "fp32", together: int = 1,
              scheduler: str | None = None) -> Resources:
    """Check what the flags of the same names say, and fill in what they do not.

    device is "cpu", "gpu" or "gpu:N"; None takes a GPU if torchcaffe has one here and no scheduler is given.  jobs defaults to as many as
    the cores allow, or the scheduler's workers.
    Raises UserError naming the flag.
    """
    if name not in backend.BACKENDS:
        raise UserError(f"--backend {name}: choose one of {', '.join(backend.BACKENDS)}")
    if (name == "caffe") != bool(caffe_python):
        raise UserError("--backend caffe needs --caffe-python, an interpreter that can import caffe" if name == "caffe" else
                        "--caffe-python is for --backend caffe: give both or neither")
    limits.require("--threads", threads, limits.Range(1, MOST_CORES if scheduler else limits.cores(), whole=True))
    limits.require("--jobs", 1 if jobs is None else jobs, limits.JOBS)
    limits.require("--together", together, limits.TOGETHER)
    if scheduler is not None and not scheduler.strip():
        raise UserError("--scheduler is empty: give the address that `dask scheduler` prints")
    if precision not in backend.PRECISIONS:
        raise UserError(f"--precision {precision}: choose one of {', '.join(backend.PRECISIONS)}")
    if name == "caffe" and (precision != "fp32" or together > 1):
        flag = f"--precision {precision}" if precision != "fp32" else f"--together {together}"
        raise UserError(f"{flag}: a real Caffe cannot; leave it away, or leave --backend caffe away")
    if device is None:
        device = "gpu" if name == "torchcaffe" and not scheduler and backend.has_gpu() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "gpu") or (number and (kind == "cpu" or not re.fullmatch("[0-9]{1,3}", number))):
        raise UserError(f"--device {device}: choose cpu, gpu or gpu:N for the N-th GPU, counted from 0")
    if kind == "cpu" and precision == "tf32":
        raise UserError("--precision tf32: only a GPU has it; choose fp32 or bf16 on a CPU")
    if kind == "gpu" and name == "torchcaffe" and not scheduler:
        backend.require_gpu(int(number or 0))
    interpreter = Interpreter(caffe_python or sys.executable, str(Path.cwd()), threads)
    engine = interpreter.require_caffe() if caffe_python else backend.engine(name)
    if not jobs and not scheduler:
        jobs = GPU_JOBS if kind == "gpu" else max(1, limits.cores() // threads)
    return Resources(Numerics(name, engine, kind, threads, precision, together), interpreter, jobs, int(number or 0), inexact, scheduler)


@dataclass(frozen=True)
class Request:
    """A table, and how much of it is to be run.  rows and nets None: all of them; nets are counted from 1."""
    table: Table
    scale: float = 1.0
    repeats: int = 1
    rows: tuple[str, ...] | None = None
    nets: tuple[int, ...] | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        """Raise UserError on numbers that are out of range."""
        for flag, value, allowed in (("--scale", self.scale, limits.SCALE), ("--repeats", self.repeats, limits.REPEAT),
                                     ("--seed", self.seed, limits.SEED)):
            limits.require(flag, value, allowed)
        for net in self.nets or ():
            limits.require("--nets", net, limits.Range(1, self.table.nets, whole=True))

    @property
    def name(self) -> str:
        """Of the folders where its results lie."""
        return self.table.name + (f"-scale{self.scale:g}" if self.scale != 1 else "")

    def runs(self) -> list[Run]:
        """Every net of every row, the teachers' first.  Raises UserError on what the table or a method refuses."""
        return [Run(self.name, x, tuple(stages_of(x)), repeat, self.table.metric)
                for repeat in range(1, self.repeats + 1)
                for x in self.table.experiments(rows=self.rows, nets=self.nets, scale=self.scale, seed=self.seed, repeat=repeat)]

    @cached_property
    def is_papers(self) -> bool:
        """Whether the table is one that `find_table` knows, unchanged."""
        return self.table.name in table_names() and find_table(self.table.name) == self.table

    def save(self, used: Resources, keys: dict[str, str], tell: Callable[[str], None]) -> None:
        """Keep it in runs/requests with the keys its stages have now, by `stage_name`; what was asked for before stays asked for."""
        path, table = REQUESTS / f"{self.name}.json", self.table.dump(REQUESTS)
        before: dict[str, Any] = {"repeats": 1, "rows": [], "nets": [], "keys": {}}
        try:
            before = _with_rows(read_sealed(path, "repeats", "nets", "keys"))
            if not is_whole(path.with_suffix(".yaml"), before.get("table_sha256", "")) and "table_sha256" in before:
                tell(f"{path.with_suffix('.yaml')} {fault(path.with_suffix('.yaml'))}; it is written again")
        except Damaged as damage:
            if path.exists() or path.with_suffix(".yaml").exists():
                tell(f"{damage}; it is written again, with what is asked for now alone")

        def joined(old: list[Any] | None, new: tuple[Any, ...] | None) -> list[Any] | None:
            return None if old is None or new is None else sorted({*old, *new})

        content = {"schema": 1, "scale": self.scale, "repeats": max(self.repeats, before["repeats"]),
                   "rows": joined(before["rows"], self.rows), "nets": joined(before["nets"], self.nets), "seed": self.seed,
                   "backend": used.numerics.backend, "device": used.numerics.device, "threads": used.numerics.threads,
                   "precision": used.numerics.precision, "together": used.numerics.together,
                   "caffe_python": used.interpreter.python if used.numerics.backend == "caffe" else None,
                   "keys": {**before["keys"], **keys}, "table_sha256": sha256(table.encode()).hexdigest()}
        if content != before or not is_whole(path.with_suffix(".yaml"), content["table_sha256"]):
            write_file(path.with_suffix(".yaml"), table)
            write_sealed(path, content)


def _with_rows(content: dict[str, Any]) -> dict[str, Any]:
    """A saved request; rows were once called methods."""
    return {"rows": content.get("methods"), **content}


def load_request(path: Path) -> tuple[Request, Resources, dict[str, str]]:
    """A request that was saved, what it is run with now, and the keys its stages had.  Raises Damaged if a file of it is."""
    again = "delete it, and run `hintkd reproduce` to have it written again"
    table = path.with_suffix(".yaml")
    try:
        content = _with_rows(read_sealed(path, "scale", "repeats", "nets", "seed", "backend", "caffe_python", "device", "threads", "keys"))
    except Damaged as damage:
        raise Damaged(f"{damage}; {again}") from None
    if not is_whole(table, content.get("table_sha256", "")) and "table_sha256" in content:
        raise Damaged(f"{table} {fault(table)}; {again}")
    rows, nets = (content[name] and tuple(content[name]) for name in ("rows", "nets"))
    request = Request(load_table(table, shown=True), content["scale"], content["repeats"], rows, nets, content["seed"])
    used = resources(content["backend"], content["caffe_python"], content["device"], content["threads"],
                     precision=content.get("precision", "fp32"), together=content.get("together", 1))
    return request, used, content["keys"]


def stage_name(run: Run, index: int, net: bool = True) -> str:
    """Of the index-th stage of a run, for people and in a saved request; without its net where nets share it."""
    x, title = run.experiment, run.stages[index].title
    repeat = f"repeat{run.repeat} " if run.repeat > 1 else ""
    return repeat + x.name + (f" net{x.net}" if net and not x.method.is_shared else "") + (f": {title}" if x.name != title else "")


def labels(runs: list[Run], plan: Plan) -> dict[str, str]:
    """What to call each task: by the first run it belongs to, without its net where several nets of that row share it.

    A task that belongs to none, such as the teacher of one row alone, is called by what starts from it.
    """
    users: dict[str, list[tuple[Run, int]]] = {}
    for run in runs:
        for index, stage in enumerate(run.stages):
            users.setdefault(plan.keys.key(stage), []).append((run, index))
    named: dict[str, str] = {}
    for key, task in reversed(plan.tasks.items()):          # what starts from a task comes before it here
        if key in users:
            run, index = users[key][0]
            shared = any(other.experiment.name == run.experiment.name and other is not run for other, _ in users[key])
            named[key] = stage_name(run, index, net=not shared)
        else:
            reader = next(other for other in plan.tasks.values() if key in other.sources)
            named[key] = f"{named[reader.key].partition(':')[0]}'s {task.stage.title}"
    return named


# --------------------------------------------------------------------------------------------------------------------- running

def reproduce(request: Request, used: Resources, console: Console, dry_run: bool = False, log_dir: Path | None = None) -> bool:
    """Run what is not finished of a request and write its records; whether all of it is there now.

    Says before what it will take.  With `dry_run` it lists the stages and stops; `log_dir` gets curves for TensorBoard.
    """
    runs, committed = request.runs(), Committed(METRICS[request.table.metric].output)
    stages, tell = [stage for run in runs for stage in run.stages], partial(warn, console)
    if not dry_run:
        restore_descriptions(stages, tell)
    plan = Plan(stages, used.numerics, committed)
    require_whole_tests(runs)
    given = [weights.source for stage in stages for part in stage.parts for weights in part.weights_in]
    for path in {source for source in given if isinstance(source, Path)}:
        backend.read_weights(path)                           # whether it can be read is said before anything runs
    named = labels(runs, plan)
    interpreter = replace(used.interpreter, folders=request.table.folders)

    def label(task: Task) -> str:
        return named[task.key]
    mend(plan, tell, repair=not dry_run)
    todo = plan.unfinished()
    console.print(f"{request.table.title}: {counted(len(plan.tasks), 'stage')}, {len(plan.tasks) - len(todo)} of them finished",
                  highlight=False)
    for sentence in committed.remarks(request.name, used.numerics, plan.names(), plan.names(todo)):
        tell(sentence)
    failures: dict[str, str] = {}
    clear()
    scalars = Scalars(log_dir, label) if log_dir and not dry_run else None
    if scalars:
        scalars.copy(plan.tasks.values())
    if not dry_run:
        request.save(used, {stage_name(run, i): plan.keys.key(stage) for run in runs for i, stage in enumerate(run.stages)}, tell)
    if todo:
        with used.executor() as executor:
            with console.status("measuring a few iterations of each net"):
                cost = estimate(plan, executor, interpreter, used.device_id, tell)
            if dry_run:
                console.print(listing(plan, named, cost))
            about = "about" if cost.is_whole else "at least"
            console.print(f"{about} {clock(cost.total_s)} with {counted(cost.jobs, 'stage')} side by side on "
                          f"{used.scheduler or used.numerics.device}, and {cost.bytes / 1e6:,.0f} MB of disk"
                          + f", {cost.remembered / 1e6:,.0f} of them for what teachers have said" * bool(cost.remembered), highlight=False)
            if dry_run:
                return False
            with Bars(console, label, cost.of) as bars:
                watcher = scalars.before(bars) if scalars else bars
                runner = Runner(executor, interpreter, watcher, cost.of, lambda task: keep(request, runs, plan, tell, task),
                                used.device_id, used.inexact)
                runner.run(plan)
        failures = runner.failures
    keep(request, runs, plan, tell)
    lost = [f"{run.experiment.name} net{run.experiment.net}" for run in runs
            if not run.experiment.method.is_shared and any(plan.task(stage).key in failures for stage in run.stages)]
    if lost:
        warn(console, ", ".join(lost), "not done")
    return not failures


def require_whole_tests(runs: list[Run]) -> None:
    """Raise UserError where a test would leave images of a data set out, or look at some twice."""
    for dataset in dict.fromkeys(run.experiment.dataset for run in runs):
        found = backend.count_records(dataset.test_lmdb)
        if found != dataset.test_size:
            raise UserError(f"{dataset.test_lmdb} holds {found:,} images, and a test looks at {dataset.test_batch} x {dataset.test_iter}: "
                            "give the table's data set a test_batch and a test_iter that fit, or name its folder with --data")


def keep(request: Request, runs: list[Run], plan: Plan, tell: Callable[[str], None], task: Task | None = None) -> None:
    """Write the records of the runs that are finished: of those that `task` belongs to, or of all."""
    done = [run for run in runs if record.is_done(run, plan)]
    if done and not request.is_papers:
        write_file(Path("results/measured", request.name, "table.yaml"), request.table.dump(Path("results/measured", request.name)))
    for run in done:
        if task is None or task.stage in run.stages:
            record.write(run, plan, tell)


def listing(plan: Plan, named: dict[str, str], cost: Estimate) -> Grid:
    """The stages of a plan, for people."""
    grid = Grid("stage", Column("iterations", justify="right"), Column("time", justify="right"), Column("folder", overflow="fold"),
                box=None, pad_edge=False)
    todo = {task.key for task in plan.unfinished()}
    for task in plan.tasks.values():
        where = WEIGHTS if task.is_finished and not task.was_run else task.folder
        grid.add_row(named[task.key], f"{task.iterations:,}", clock(cost.of(task)) if task.key in todo else "finished", str(where))
    return grid
