"""Curves for TensorBoard: what the stages' logs say, in a folder of event files, while they are written.

It only copies: losses, rates and test outputs stand in the logs and records, with or without it.
"""
from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from hintkd.backend import how_to_get
from hintkd.errors import UserError
from hintkd.run.plan import Task
from hintkd.run.runner import Watcher
from hintkd.stage.log import Log, Tail


class Scalars:
    """Writes the curves of tasks into folder/<label>; as a runner's watcher it passes all it is told to another one.

    Raises UserError where the package tensorboard is not installed or the folder cannot be made.
    """

    def __init__(self, folder: Path, label: Callable[[Task], str]):
        try:
            tensorboard("summary.writer.event_file_writer")
        except ImportError:
            raise UserError(f"--log-dir needs TensorBoard's writer: {how_to_get('tensorboard')}") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--log-dir {folder}: {error.strerror}; name another folder") from None
        self.folder, self.label = folder, label
        self.watcher: Watcher
        self.running: dict[str, Followed] = {}

    def before(self, watcher: Watcher) -> Scalars:
        """Itself, as a watcher that comes before another one."""
        self.watcher = watcher
        return self

    def copy(self, tasks: Iterable[Task]) -> None:
        """Write all that the tasks' logs say now."""
        for task in tasks:
            if (task.folder / "log.txt").exists():
                followed = self._follow(task)
                followed.write()
                followed.close()

    def _follow(self, task: Task) -> Followed:
        return Followed(self.folder / self.label(task).replace(": ", "/").replace(" ", "-"), task.folder / "log.txt")

    def begin(self, tasks: list[Task]) -> None:
        self.watcher.begin(tasks)

    def started(self, task: Task) -> None:
        self.running[task.key] = self._follow(task)
        self.watcher.started(task)

    def tick(self) -> None:
        for followed in self.running.values():
            followed.write()
        self.watcher.tick()

    def finished(self, task: Task) -> None:
        self._end(task)
        self.watcher.finished(task)

    def told(self, sentence: str) -> None:
        self.watcher.told(sentence)

    def failed(self, task: Task, sentence: str) -> None:
        self._end(task)
        self.watcher.failed(task, sentence)

    def _end(self, task: Task) -> None:
        followed = self.running.pop(task.key, None)
        if followed:
            followed.write()
            followed.close()


class Followed:
    """One log and its event file."""

    def __init__(self, folder: Path, log: Path):
        self.folder, self.tail = folder, Tail(str(log))
        self.counts: dict[str, int] = {}                     # points of each curve that are written
        self.writer: Any = None

    def write(self) -> None:
        """Write what came since the last call; a log that went back, for its stage was resumed, is written anew."""
        log = self.tail.poll()
        found = dict(curves(log))
        if self.writer is None or any(len(found.get(name, ())) < count for name, count in self.counts.items()):
            self._begin()
        for name, curve in found.items():
            for iteration, value in curve[self.counts.get(name, 0):]:
                self._add(name, iteration, value)
            self.counts[name] = len(curve)
        self.writer.flush()

    def _begin(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer, self.counts = tensorboard("summary.writer.event_file_writer").EventFileWriter(str(self.folder)), {}

    def _add(self, name: str, iteration: int, value: float) -> None:
        summary = tensorboard("compat.proto.summary_pb2").Summary
        content = summary(value=[summary.Value(tag=name, simple_value=value)])
        self.writer.add_event(tensorboard("compat.proto.event_pb2").Event(step=iteration, summary=content))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def tensorboard(module: str) -> Any:
    """A module of the package tensorboard, whose own writer needs neither TensorFlow nor torch.  Raises ImportError."""
    return import_module(f"tensorboard.{module}")


def curves(log: Log) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Every curve of a log under its tag: loss, lr, train/hint_loss, test/accuracy."""
    yield "loss", log.loss
    yield "lr", log.lr
    for phase, outputs in (("train", log.train), ("test", log.test)):
        for name, curve in outputs.items():
            yield f"{phase}/{name}", curve
