"""What a run looks like on the screen: one bar for everything and one for each running stage, read from the stages' logs.

Where the output is not a terminal, a line for each stage that ends takes the place of the bars.
"""
from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hintkd.run.plan import Task
from hintkd.stage.log import Tail


class Bars:
    """A runner's watcher.

    label      what to call a task: which rows of a table it belongs to
    seconds    its expected duration; the bar for everything counts these
    """

    def __init__(self, console: Console, label: Callable[[Task], str], seconds: Callable[[Task], float]):
        self.console, self.label, self.seconds = console, label, seconds
        self.bars = Progress(TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"),
                             TextColumn("{task.fields[note]}"), console=console, transient=True,
                             disable=console.quiet or not console.is_terminal)
        self.shown: dict[str, tuple[TaskID, Tail, Task]] = {}
        self.total = self.ended = 0
        self.spent = 0.0                                     # expected seconds of the tasks that ended
        self.everything: TaskID | None = None

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()

    def begin(self, tasks: list[Task]) -> None:
        self.total = len(tasks)
        self.everything = self.bars.add_task("all stages", total=sum(map(self.seconds, tasks)) or 1.0, note="")

    def started(self, task: Task) -> None:
        bar = self.bars.add_task("  " + self.label(task), total=task.iterations, note="starting")
        self.shown[task.key] = bar, Tail(str(task.folder / "log.txt")), task

    def tick(self) -> None:
        """Read the logs and move the bars."""
        partly = 0.0
        for bar, tail, task in self.shown.values():
            log = tail.poll()
            iteration = min(log.iteration or 0, task.iterations)
            partly += self.seconds(task) * iteration / task.iterations
            rate = log.rate
            note = f"{iteration:,} / {task.iterations:,}"
            if rate:
                note += f"  {rate:.3g} it/s  {clock((task.iterations - iteration) / rate)} left"
            self.bars.update(bar, completed=iteration, note=note)
        if self.everything is not None:
            self.bars.update(self.everything, completed=self.spent + partly, note=self._overall())

    def _overall(self) -> str:
        """Stages done, and the time left at the speed so far."""
        bar, text = self.bars.tasks[0], f"{self.ended} / {counted(self.total, 'stage')}"
        if bar.completed and bar.elapsed and bar.remaining is not None:
            text += f"  {clock(bar.remaining / bar.completed * bar.elapsed)} left"
        return text

    def finished(self, task: Task) -> None:
        wall = task.result()["wall_s"]
        self._end(task, f"{self.label(task)}: {task.iterations:,} iterations in {clock(wall)}")

    def told(self, sentence: str) -> None:
        warn(self.console, sentence)

    def failed(self, task: Task, sentence: str) -> None:
        self._end(task, "")
        warn(self.console, sentence, f"{self.label(task)} failed")

    def _end(self, task: Task, line: str) -> None:
        if task.key in self.shown:
            self.bars.remove_task(self.shown.pop(task.key)[0])
        self.ended += 1
        self.spent += self.seconds(task)
        if line and not self.console.is_terminal:
            self.console.print(f"[{self.ended}/{self.total}] {line}", markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """A duration for people: 4.2 s, 3:07 or 5:00:00."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds))).removeprefix("0:")


def counted(count: int, what: str) -> str:
    """1 stage, 2 stages."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def warn(console: Console, sentence: str, kind: str = "note") -> None:
    """Tell what is not as it should be while the work goes on; a console that is quiet leaves it to the standard error."""
    where = Console(stderr=True) if console.quiet else console
    where.print(f"[{'yellow' if kind == 'note' else 'red'}]{escape(kind)}:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
