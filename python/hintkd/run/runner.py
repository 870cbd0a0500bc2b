"""The runner: orders stages by the weights they need, gives each a folder, has them run, and keeps what comes out.

It knows stages only: no method, no table, no Caffe.  Equal stages are one task; a finished task is not run again; a failed one stops only
what starts from it.  Stages run wherever the executor runs `executor.run_folders`; progress is read from their logs.
"""
from __future__ import annotations

import hashlib
import queue
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from hintkd.backend import caffe_pb2, read_weights, write_text, write_weights
from hintkd.errors import Damaged, UserError
from hintkd.files import fault, is_whole, read_sealed, sha256_of, write_file, write_json, write_sealed, written
from hintkd.methods.stage import Stage
from hintkd.run.committed import Committed, Recorded
from hintkd.run.earlier import kept
from hintkd.run.executor import ExecutorLost, Interpreter, run_folders
from hintkd.run.keys import Keys, Setting

STAGES = Path("runs/stages")                # relative to the workspace, which is the current directory
REMEMBERED = Path("runs/remembered")        # what teachers have said, which no result depends on: it may be deleted at any time
POLL_S = 0.2                                # how often progress is read from the logs, seconds


@dataclass(frozen=True)
class Task:
    """A stage, its key and its folder."""
    stage: Stage
    key: str
    sources: tuple[str, ...]                # keys of the tasks whose weights it starts from
    recorded: Recorded | None = None        # what a committed record has of it

    @property
    def folder(self) -> Path:
        return STAGES / f"{self.stage.title}-{self.key[:12]}"

    @property
    def weights(self) -> Path:
        """The weights out, where they are written in this workspace."""
        return self.folder / "weights.caffemodel"

    @property
    def was_run(self) -> bool:
        """Whether its result and its weights are in this workspace."""
        return (self.folder / "result.json").exists() and self.weights.exists()

    @property
    def is_finished(self) -> bool:
        """Whether there are weights, its own or committed ones."""
        return self.was_run or (self.recorded is not None and self.recorded.weights is not None)

    @property
    def iterations(self) -> int:
        return self.stage.solver.max_iter

    @property
    def begun_in(self) -> list[str]:
        """The keys of the group in which it was begun, its own among them; none if it was not."""
        try:
            return read_sealed(self.folder / "progress.json").get("group", [self.key])
        except Damaged:
            return []

    def result(self) -> dict[str, Any]:
        """What the stage program says of the finished stage.  Raises Damaged if its file is."""
        return read_sealed(self.folder / "result.json", "weights")

    def predictions(self) -> dict[str, np.ndarray]:
        """The class scores and labels of the final test.  Raises Damaged if they cannot be read."""
        path = self.folder / "predictions.npz"
        try:
            with np.load(path) as found:
                return {name: found[name] for name in ("scores", "labels")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            raise Damaged(f"{path} {fault(path)}") from None


class Plan:
    """The tasks of some stages and of all that they start from, sources first.

    committed    what need not be run because a committed record tells of it; without it, only what was run in this workspace counts
    """

    def __init__(self, stages: Iterable[Stage], setting: Setting, committed: Committed | None = None):
        self.setting, self.keys, self.committed = setting, Keys(setting, kept(STAGES)), committed
        self.tasks: dict[str, Task] = {}
        for stage in stages:
            self._add(stage)

    def _add(self, stage: Stage) -> str:
        key = self.keys.key(stage)
        if key not in self.tasks:
            sources = tuple(self._add(source) for source in stage.sources)
            recorded = self.committed.find(self.keys.today(stage)) if self.committed else None
            self.tasks[key] = Task(stage, key, sources, recorded)
        return key

    def task(self, stage: Stage) -> Task:
        return self.tasks[self.keys.key(stage)]

    def group(self, first: Task, ready: Iterable[str]) -> list[Task]:
        """The tasks among those `ready`, by key, that train together with `first`, in the plan's order.

        They are those it was begun with, so that it can go on, or else as many of its kind as the setting allows that cannot go on.
        """
        known, kind = set(ready), self.keys.kind(first.stage)

        def goes_on(task: Task) -> bool:
            return bool(task.begun_in) and known.issuperset(task.begun_in)
        if goes_on(first):
            return [self.tasks[key] for key in first.begun_in]
        others = [task.key for task in self.tasks.values()
                  if task.key in known - {first.key} and self.keys.kind(task.stage) == kind and not goes_on(task)]
        chosen = {first.key, *others[:self.setting.together - 1]}
        return [task for task in self.tasks.values() if task.key in chosen]

    def names(self, tasks: Iterable[Task] | None = None) -> set[str]:
        """What other workspaces call the tasks, all or these: their keys by today's definition."""
        return {self.keys.today(task.stage) for task in (self.tasks.values() if tasks is None else tasks)}

    def unfinished(self) -> list[Task]:
        """What is to be run: not what is finished, nor what a record tells of and nothing unfinished starts from."""
        needed: set[str] = set()
        found = []
        for task in reversed(self.tasks.values()):          # what starts from a task comes before it here
            if not task.is_finished and (task.recorded is None or task.key in needed):
                needed.update(task.sources)
                found.append(task)
        return found[::-1]


class Watcher(Protocol):
    """Whoever shows how a run goes on."""

    def begin(self, tasks: list[Task]) -> None: ...
    def started(self, task: Task) -> None: ...
    def tick(self) -> None: ...
    def finished(self, task: Task) -> None: ...
    def told(self, sentence: str) -> None: ...
    def failed(self, task: Task, sentence: str) -> None: ...


@dataclass
class Runner:
    """Runs plans.

    executor       anything with submit(function, *arguments) that returns futures with add_done_callback, exception and cancelled, and
                   with slots, how many stages it runs side by side, which may change; those that train together count as one
    seconds        expected duration of a task; of the tasks that can run, the one with the longest chain behind it goes first
    on_finished    called after each task whose weights and result are there
    """
    executor: Any
    interpreter: Interpreter
    watcher: Watcher
    seconds: Callable[[Task], float] = lambda task: float(task.iterations)
    on_finished: Callable[[Task], None] = lambda task: None
    device_id: int = 0
    inexact: bool = False
    failures: dict[str, str] = field(default_factory=dict)   # key of a task -> why it failed, or which other task's failure stops it

    def run(self, plan: Plan) -> None:
        """Run what is not finished; `failures` says what could not be."""
        todo = {task.key: task for task in plan.unfinished()}
        rank = ranks(plan, self.seconds)
        waiting = {key: {source for source in task.sources if source in todo} for key, task in todo.items()}
        ready = {key for key, missing in waiting.items() if not missing}
        running: dict[Any, list[Task]] = {}
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.watcher.begin(list(todo.values()))
        while ready or running:
            while ready and len(running) < self.executor.slots:
                group = plan.group(todo[min(ready, key=lambda key: (-rank[key], key))], ready)
                failed = self._write(group, plan, todo)
                if failed:
                    ready -= failed
                    continue
                ready.difference_update(task.key for task in group)
                for task in group:
                    self.watcher.started(task)
                future = self.executor.submit(run_folders, [str(task.folder) for task in group], self.interpreter)
                running[future] = group
                future.add_done_callback(done.put)
            with suppress(queue.Empty):
                future = done.get(timeout=POLL_S)
                self._tell(future)
                group = running.pop(future)
                for task in group:
                    self._settle(task, future, todo, group[0])
                    if task.is_finished:
                        for key, missing in waiting.items():
                            if task.key in missing:
                                missing.remove(task.key)
                                if not missing:
                                    ready.add(key)
            self.watcher.tick()

    def _write(self, group: list[Task], plan: Plan, todo: dict[str, Task]) -> set[str]:
        """Write the folders of a group; the keys of the tasks that this fails."""
        failed = set()
        for task in group:
            try:
                write_folder(task, plan, stage_json(task, [member.key for member in group], plan.setting, self.device_id, self.inexact))
            except UserError as error:
                self._fail(task, str(error), todo)
                failed.add(task.key)
        return failed

    def _tell(self, future: Any) -> None:
        """Pass on what a stage program found damaged, and what it did about it."""
        if not future.cancelled() and future.exception() is None:
            for sentence in future.result() or ():
                self.watcher.told(sentence)

    def _settle(self, task: Task, future: Any, todo: dict[str, Task], first: Task) -> None:
        """Keep the weights of a stage that ended, or note why it failed; `first` of its group has the reason of all."""
        try:
            error = future.exception()
        except CancelledError:
            error = UserError("it was cancelled")
        if error is None:
            try:
                keep_weights(task)
            except UserError as damage:
                self._fail(task, str(damage), todo)
                return
            self.on_finished(task)
            self.watcher.finished(task)
        elif isinstance(error, UserError) and not isinstance(error, ExecutorLost):
            together = f"it trains together with {first.folder.name}, which failed"
            self._fail(task, str(error) if task is first else together, todo)
        else:
            raise error

    def _fail(self, task: Task, sentence: str, todo: dict[str, Task]) -> None:
        """Note a failure, and that all that starts from this task will not run."""
        self.failures[task.key] = sentence
        self.watcher.failed(task, sentence)
        for other in todo.values():
            if other.key not in self.failures and any(source in self.failures for source in other.sources):
                self.failures[other.key] = f"it needs {task.stage.title}, which failed"



def ranks(plan: Plan, seconds: Callable[[Task], float]) -> dict[str, float]:
    """Per task the seconds from its start to the end of the longest chain that hangs on it: the longest goes first."""
    rank: dict[str, float] = {}
    for task in reversed(plan.tasks.values()):              # sources come first in a plan, so dependants come first here
        rank[task.key] = rank.get(task.key, 0.0) + seconds(task)
        for source in task.sources:
            rank[source] = max(rank.get(source, 0.0), rank[task.key])
    return rank


# ----------------------------------------------------------------------------------------------------------------- folders

def stage_json(task: Task, group: list[str], setting: Setting, device_id: int = 0, inexact: bool = False) -> dict[str, Any]:
    """What the stage program is told beside the prototxts; `group` has the keys of all that train together, the task's own among them."""
    solver = task.stage.solver
    return {"schema": 1, "title": task.stage.title, "key": task.key, "group": group, "program": task.stage.program,
            "iterations": task.iterations, "snapshot": solver.snapshot, "test_iter": sum(solver.test_iter),
            "predictions": predictions_of(task.stage.net),
            "backend": setting.backend, "device": setting.device, "device_id": device_id, "threads": setting.threads,
            "precision": setting.precision, "remember": str(REMEMBERED), "inexact": inexact}


def write_folder(task: Task, plan: Plan, told: dict[str, Any], init: str | None = None) -> None:
    """All that the stage program needs, also for `caffe train --solver=FOLDER/solver.prototxt --weights=FOLDER/init.caffemodel`.

    told    its stage.json, to which the digest of the weights in is added
    init    that digest, where it is known from elsewhere than the stage.json that is there
    Writing it again changes nothing, so that it may be written while another process runs the stage.
    """
    folder = task.folder
    solver = caffe_pb2.SolverParameter()
    solver.CopyFrom(task.stage.solver)
    solver.net, solver.snapshot_prefix = str(folder / "net.prototxt"), str(folder / "snapshot")
    solver.solver_mode = solver.GPU if told["device"] == "gpu" else solver.CPU
    solver.device_id = told["device_id"]
    write_file(folder / "net.prototxt", write_text(task.stage.net))
    write_file(folder / "solver.prototxt", write_text(solver))
    write_sealed(folder / "key.json", {"key": task.key, "parts": plan.keys.parts(task.stage)})
    digest = write_init(task, plan, init) if task.stage.weights_in else None
    write_json(folder / "stage.json", {**told, "init": digest})


def write_init(task: Task, plan: Plan, known: str | None = None) -> str:
    """Write the weights in, unless they are there as they were written; their digest."""
    init = task.folder / "init.caffemodel"
    with suppress(Damaged):
        known = known or read_sealed(task.folder / "stage.json").get("init")
    if known and is_whole(init, known):
        return known
    write_weights(init, compose(task, plan).items())
    return sha256_of(init)


def compose(task: Task, plan: Plan) -> dict[str, list[np.ndarray]]:
    """The weights a stage starts from: layer -> blobs, chosen and renamed as its weights_in say.

    Raises UserError where a source lacks a layer that is asked for, or that the net has under the source's prefix with its parameters
    fixed in writing: it would keep random weights, as in Caffe, and never learn.
    """
    layers: dict[str, list[np.ndarray]] = {}
    for weights in task.stage.weights_in:
        path = whole_weights(plan.task(weights.source)) if isinstance(weights.source, Stage) else weights.source
        found = {name: blobs for name, blobs in read_weights(path) if weights.layers is None or name in weights.layers}
        fixed = [layer.name.removeprefix(weights.prefix) for layer in task.stage.net.layer
                 if weights.prefix and layer.name.startswith(weights.prefix) and layer.param]
        missing = sorted({*(weights.layers or ()), *fixed} - set(found))
        if missing:
            raise UserError(f"{path} has no weights for layer {missing[0]}, which {task.stage.title} needs: give a file that fits the net")
        layers.update((weights.prefix + name, blobs) for name, blobs in found.items())
    return layers


def keep_weights(task: Task) -> None:
    """Write the weights out: the final snapshot without what the stage leaves behind; the result holds their digest.

    Raises Damaged if the final snapshot is.
    """
    result = task.result()
    final = task.folder / result["weights"]
    known = result.get("digests", {}).get(final.name)
    if known and not is_whole(final, known):
        raise Damaged(f"{final} {fault(final)}")
    write_weights(task.weights, [(name, blobs) for name, blobs in read_weights(final) if task.stage.keeps(name)])
    digests = {**result.get("digests", {}), task.weights.name: sha256_of(task.weights)}
    if digests != result.get("digests"):
        write_sealed(task.folder / "result.json", {**result, "digests": digests})


def whole_weights(task: Task) -> Path:
    """Where a finished task's weights out are.  Raises Damaged if they are not what was written."""
    if not task.was_run and task.recorded and task.recorded.weights:
        return task.recorded.weights
    known = task.result().get("digests", {}).get(task.weights.name)
    if not task.weights.exists() or (known and not is_whole(task.weights, known)):
        raise Damaged(f"{task.weights} {fault(task.weights)}; give the same command again, which mends it")
    return task.weights


def predictions_of(net: caffe_pb2.NetParameter) -> dict[str, str]:
    """The blobs that a net's accuracy compares, class scores and labels; none for a net without one."""
    accuracy = next((layer for layer in net.layer if layer.type == "Accuracy"), None)
    return {"scores": accuracy.bottom[0], "labels": accuracy.bottom[1]} if accuracy else {}


def test_net(stage: Stage) -> caffe_pb2.NetParameter:
    """The student or teacher of a stage as it is tested: without the layers of training alone, those the stage leaves behind, and rules."""
    net = caffe_pb2.NetParameter()
    net.CopyFrom(stage.net)
    del net.layer[:]
    for layer in stage.net.layer:
        if stage.keeps(layer.name) and (not layer.include or any(rule.phase == caffe_pb2.TEST for rule in layer.include)):
            kept = net.layer.add()
            kept.CopyFrom(layer)
            del kept.include[:]
    return net


def publish_weights(task: Task, path: Path) -> list[str]:
    """Copy the weights out to PATH.caffemodel, and the net they are tested in to PATH.prototxt, where that is not what lies there.

    Returns what was wrong with files that were there.
    """
    weights, net = (path.with_name(path.name + suffix) for suffix in (".caffemodel", ".prototxt"))
    source, text, found = whole_weights(task), write_text(test_net(task.stage)), []
    if not is_whole(weights, sha256_of(source)):
        found.append(f"{weights} {fault(weights)}")
        weights.parent.mkdir(parents=True, exist_ok=True)
        with written(weights) as part:
            part.write_bytes(source.read_bytes())
    if not is_whole(net, hashlib.sha256(text.encode()).hexdigest()):
        found.append(f"{net} {fault(net)}")
        write_file(net, text)
    return found
