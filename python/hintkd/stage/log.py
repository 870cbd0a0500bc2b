"""Caffe's training log, read back: losses, outputs, rates and times, whole or while it grows.

Both wordings are understood: `Iteration N, loss = x` and 1.0's `Iteration N (x iter/s, y s/z iters), loss = x`.  Where a log shows an
iteration again, because the run was resumed, what stood there before is dropped: the curves are those of the run that
counts.  What wrote the log, and what the figures mean, is left to others.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

PREFIX = re.compile(r"^[IWEF](?P<date>\d{4}|\d{8}) (?P<clock>\d\d:\d\d:\d\d(?:\.\d+)?)\s+\d+ (?P<where>[^\s\]]+:\d+)\] ?(?P<rest>.*)$")
NUMBER = r"([-+]?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?))"
LOSS = re.compile(rf"^Iteration (\d+)(?: \(.*\))?, loss = {NUMBER}", re.IGNORECASE)
RATE = re.compile(rf"^Iteration (\d+), lr = {NUMBER}", re.IGNORECASE)
TESTING = re.compile(r"^Iteration (\d+), Testing net \(#(\d+)\)")
OUTPUT = re.compile(rf"^\s*(Train|Test) net output #(\d+): (\S+) = {NUMBER}", re.IGNORECASE)
START = re.compile(r"^Stage \S+ starts at iteration (\d+)")
START_LINE = "Stage {} starts at iteration {}"             # what the stage process writes when it starts or resumes

Curve = list[tuple[int, float]]                             # (iteration, value), by rising iteration
MARKS = 12                                                  # displays over which a rate is taken


@dataclass
class Log:
    """What a log says so far.

    Output names are the blobs'; the elements of a blob with several are told apart as name, name[1], name[2] ...; the
    outputs of a second test net are called net1/name.
    """
    loss: Curve = field(default_factory=list)               # (iteration, displayed loss)
    lr: Curve = field(default_factory=list)                 # (iteration, rate)
    train: dict[str, Curve] = field(default_factory=dict)   # output -> its curve
    test: dict[str, Curve] = field(default_factory=dict)
    iteration: int | None = None                            # the last one displayed or tested
    done: bool = False                                      # "Optimization Done." was reached
    seconds: float = 0.0                                    # between first and last line, less the pauses before resumes
    _marks: Curve = field(default_factory=list)             # (iteration, seconds) of the last displays
    _clock: datetime | None = None
    _net: int = 0
    _names: dict[tuple[str, int], str] = field(default_factory=dict)
    _rest: str = ""

    def feed(self, text: str) -> None:
        """Read on; a line cut in two by the end of `text` waits for its other half."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    @property
    def rate(self) -> float | None:
        """Iterations per second over the last displays, None until two of them are seen."""
        if len(self._marks) < 2:
            return None
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else None

    def _line(self, line: str) -> None:
        prefix = PREFIX.match(line)
        if not prefix:
            return
        text = prefix["rest"]
        start = START.match(text)
        self._tick(prefix["date"], prefix["clock"], pause=bool(start))
        if start:
            self._marks.clear()
            self._at(int(start[1]))
        elif found := LOSS.match(text):
            iteration = self._at(int(found[1]))
            put(self.loss, iteration, float(found[2]))
            self._marks = [*self._marks[1 - MARKS:], (iteration, self.seconds)]
        elif found := RATE.match(text):
            put(self.lr, self._at(int(found[1])), float(found[2]))
        elif found := TESTING.match(text):
            self._at(int(found[1]))
            self._net = int(found[2])
        elif found := OUTPUT.match(text):
            if self.iteration is not None:
                name = self._name(found[1], int(found[2]), found[3])
                curves = self.train if found[1].lower() == "train" else self.test
                put(curves.setdefault(name, []), self.iteration, float(found[4]))
        elif text.startswith("Optimization Done"):
            self.done = True

    def _at(self, iteration: int) -> int:
        """Note the iteration that is spoken of; going back to an earlier one drops what came after it."""
        if self.iteration is not None and iteration < self.iteration:
            for curve in (self.loss, self.lr, *self.train.values(), *self.test.values()):
                while curve and curve[-1][0] >= iteration:
                    curve.pop()
            self._marks.clear()
            self.done = False
        self.iteration = iteration
        return iteration

    def _name(self, phase: str, index: int, blob: str) -> str:
        """The output's name: the blob's, with a number if elements of that blob came before it."""
        net = f"net{self._net}/" if phase.lower() == "test" and self._net else ""
        name = self._names.setdefault((phase + net, index), blob)
        before = sum(1 for k in range(index) if self._names.get((phase + net, k)) == name)
        return net + (f"{blob}[{before}]" if before else blob)

    def _tick(self, date: str, clock: str, pause: bool) -> None:
        """Add the time since the last line; glog's dates have no year: the step back at New Year counts as none."""
        year, clock = (date[:4], clock) if len(date) == 8 else ("2000", clock)
        now = datetime.strptime(f"{year}{date[-4:]} {clock if '.' in clock else clock + '.0'}", "%Y%m%d %H:%M:%S.%f")
        if self._clock is not None and not pause:
            self.seconds += max(0.0, (now - self._clock).total_seconds())
        self._clock = now


def put(curve: Curve, iteration: int, value: float) -> None:
    """Append to a curve; an iteration that is shown twice keeps its second value."""
    if curve and curve[-1][0] == iteration:
        curve.pop()
    curve.append((iteration, value))


def parse(text: str) -> Log:
    """A whole log."""
    log = Log()
    log.feed(text if text.endswith("\n") else text + "\n")
    return log


class Tail:
    """A log file that is still being written."""

    def __init__(self, path: str):
        self.path, self.log, self._offset = path, Log(), 0

    def poll(self) -> Log:
        """Read what was added since the last call; a file that is not there yet has said nothing, one that shrank is read anew."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self._offset:
                    self.log, self._offset = Log(), 0
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return self.log
        self._offset += len(added)
        self.log.feed(added.decode("utf-8", errors="replace"))
        return self.log
