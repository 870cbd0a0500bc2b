"""The plan of a run: some stages and all that they start from as tasks, each with its key, its folder and what is known of it.

Equal stages are one task; a finished one is not run again.  What lies in a folder is folders.py's business, running runner.py's.
"""
from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from hintkd.errors import Damaged
from hintkd.files import fault, read_sealed
from hintkd.methods.stage import Part, Stage
from hintkd.run.committed import Committed, Recorded
from hintkd.run.earlier import kept
from hintkd.run.keys import Keys, Numerics

STAGES = Path("runs/stages")                # relative to the workspace, which is the current directory


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

    def part_folder(self, part: Part | None = None) -> Path:
        """Of a part, by default the first; that of an only part is the stage's."""
        return self.folder / (part or self.stage.parts[0]).name

    def weights_of(self, part: Part | None = None) -> Path:
        """The weights out of a part, by default the first, where they are written in this workspace."""
        return self.part_folder(part) / "weights.caffemodel"

    @property
    def weights(self) -> Path:
        return self.weights_of()

    @property
    def was_run(self) -> bool:
        """Whether its result and its weights are in this workspace."""
        return (self.folder / "result.json").exists() and all(self.weights_of(part).exists() for part in self.stage.parts)

    @property
    def is_finished(self) -> bool:
        """Whether there are weights, its own or committed ones."""
        return self.was_run or (self.recorded is not None and self.recorded.weights is not None)

    @property
    def iterations(self) -> int:
        return self.stage.iterations

    def progress(self, *wanted: str) -> dict[str, Any]:
        """What is known of a stage that was begun, of these names at least.  Raises Damaged if that cannot be read."""
        return read_sealed(self.part_folder() / "progress.json", *wanted)

    @property
    def begun_in(self) -> list[str]:
        """The keys of the group in which it was begun, its own among them; none if it was not."""
        try:
            return self.progress().get("group", [self.key])
        except Damaged:
            return []

    def result(self) -> dict[str, Any]:
        """What the stage process says of the finished stage.  Raises Damaged if its file is."""
        return read_sealed(self.folder / "result.json", "weights")

    def predictions(self) -> dict[str, np.ndarray]:
        """The class scores and labels of the final test.  Raises Damaged if they cannot be read."""
        path = self.part_folder() / "predictions.npz"
        try:
            with np.load(path) as found:
                return {name: found[name] for name in ("scores", "labels")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            raise Damaged(f"{path} {fault(path)}") from None


class Plan:
    """The tasks of some stages and of all that they start from, sources first.

    committed    what need not be run because a committed record tells of it; without it, only what was run in this workspace counts
    """

    def __init__(self, stages: Iterable[Stage], numerics: Numerics, committed: Committed | None = None):
        self.numerics, self.keys, self.committed = numerics, Keys(numerics, kept(STAGES)), committed
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

        They are those it was begun with, so that it can go on, or else as many of its kind as the numerics allow that cannot go on.
        """
        known, kind = set(ready), self.keys.kind(first.stage)

        def goes_on(task: Task) -> bool:
            return bool(task.begun_in) and known.issuperset(task.begun_in)
        if goes_on(first):
            return [self.tasks[key] for key in first.begun_in]
        others = [task.key for task in self.tasks.values()
                  if task.key in known - {first.key} and self.keys.kind(task.stage) == kind and not goes_on(task)]
        chosen = {first.key, *others[:self.numerics.together - 1]}
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


def ranks(plan: Plan, seconds: Callable[[Task], float]) -> dict[str, float]:
    """Per task the seconds from its start to the end of the longest chain that hangs on it: the longest goes first."""
    rank: dict[str, float] = {}
    for task in reversed(plan.tasks.values()):              # sources come first in a plan, so dependants come first here
        rank[task.key] = rank.get(task.key, 0.0) + seconds(task)
        for source in task.sources:
            rank[source] = max(rank.get(source, 0.0), rank[task.key])
    return rank
