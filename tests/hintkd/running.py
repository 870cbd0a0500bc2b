"""Runs of small stages: what a runner says of them, and an executor that trains nothing."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from hintkd.backend import engine, read_weights, write_weights
from hintkd.errors import UserError
from hintkd.methods.stage import Stage, Weights
from hintkd.run.executor import Interpreter
from hintkd.run.keys import Numerics
from hintkd.run.plan import Plan, Task
from hintkd.run.runner import Runner


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Until it holds.  The machine may be busy: only after a quarter of an hour it is taken to be never."""
    for _ in range(18_000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} never came")


class Watcher:
    """Notes what a runner says."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def begin(self, tasks: list[Task]) -> None:
        self.events.append(("begin", str(len(tasks))))

    def started(self, task: Task) -> None:
        self.events.append(("started", task.stage.title))

    def finished(self, task: Task) -> None:
        self.events.append(("finished", task.stage.title))

    def failed(self, task: Task, sentence: str) -> None:
        self.events.append(("failed", task.stage.title))

    def told(self, sentence: str) -> None:
        self.events.append(("told", sentence))

    def tick(self) -> None:
        pass


def numerics(**changes: Any) -> Numerics:
    return replace(Numerics("torchcaffe", engine("torchcaffe")), **changes)


def interpreter() -> Interpreter:
    return Interpreter(sys.executable, str(Path.cwd()))


def run(stages: list[Stage], executor: Any, slots: int = 2, together: int = 1, **more: Any) -> tuple[Plan, Runner, Watcher]:
    plan, watcher = Plan(stages, numerics(together=together)), Watcher()
    executor.slots = slots
    runner = Runner(executor, interpreter(), watcher, **more)
    runner.run(plan)
    return plan, runner, watcher


def weights_of(task: Task) -> dict[str, list[np.ndarray]]:
    return dict(read_weights(task.weights))


class Immediate:
    """An executor that runs nothing: each stage ends at once, with a result and a snapshot that hold its title."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.order = failing, []

    def submit(self, function: Any, folders: list[str], interpreter: Interpreter) -> Future:
        future: Future = Future()
        stages = [json.loads(Path(folder, "stage.json").read_text()) for folder in folders]
        assert all(stage["group"] == [each["key"] for each in stages] for stage in stages)
        self.order.append("+".join(stage["title"] for stage in stages))
        if self.failing in [stage["title"] for stage in stages]:
            future.set_exception(UserError("it diverged"))
            return future
        for folder in folders:
            write_weights(Path(folder) / "end.caffemodel", [("hidden", [np.zeros(3, np.float32)])])
            Path(folder, "result.json").write_text(json.dumps({"weights": "end.caffemodel", "wall_s": 1.0}))
        future.set_result(None)
        return future


def chain(*titles: str, seed: int = 1) -> list[Stage]:
    """Stages that each start from the one before."""
    stages: list[Stage] = []
    for title in titles:
        stages.append(Stage.solve(title, tiny.net(), tiny.solver(seed), weights_in=(Weights(stages[-1]),) if stages else ()))
    return stages
