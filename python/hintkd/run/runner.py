"""The runner: orders stages by the weights they need, has each run in its folder, and keeps what comes out.

It knows stages only: no method, no table, no Caffe.  A failed stage stops only what starts from it.  Stages run wherever the executor
runs `executor.run_folders`; progress is read from their logs.
"""
from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from hintkd.errors import UserError
from hintkd.run.executor import ExecutorLost, Interpreter, run_folders
from hintkd.run.folders import keep_weights, stage_json, write_folder
from hintkd.run.plan import Plan, Task, ranks

POLL_S = 0.2                                # how often progress is read from the logs, seconds


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
                write_folder(task, plan, stage_json(task, [member.key for member in group], plan.numerics, self.device_id, self.inexact))
            except UserError as error:
                self._fail(task, str(error), todo)
                failed.add(task.key)
        return failed

    def _tell(self, future: Any) -> None:
        """Pass on what a stage process found damaged, and what it did about it."""
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
